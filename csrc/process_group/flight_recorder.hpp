// SPDX-License-Identifier: Apache-2.0
// The last operations of this process, in the format of torch's recorder.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace torch {
struct CapturedTraceback;
}

namespace automoe {

/// An operation at the call. The references need to live for begin() only.
struct FlightCall {
  /// Name and description that c10d gave the group.
  const std::string& group;
  const std::string& description;
  /// "automoe:all_reduce", or what pointToPointTitle() makes.
  std::string title;
  /// Number among the collectives of the group, or among what this rank has
  /// sent and received in it.
  uint64_t sequence;
  bool pointToPoint;
  const std::vector<at::Tensor>& inputs;
  const std::vector<at::Tensor>& outputs;
  std::chrono::milliseconds timeout;
};

/// "automoe:send 0->3" or "automoe:recv 3<-0"; ranks of the group, -1 for any.
std::string pointToPointTitle(bool sends, int rank, int peer);

class FlightRecorder;
class PickleWriter;

/// Ends an entry. Copies end the same one; nothing happens where recording is
/// off.
class FlightRecord {
 public:
  FlightRecord() = default;
  FlightRecord(FlightRecorder* recorder, uint64_t id)
      : recorder_(recorder), id_(id) {}

  /// Never takes the GIL and allocates nothing: any thread may call it, the
  /// engine's too. `completed` is false for an operation that failed.
  void end(bool completed) const;

 private:
  FlightRecorder* recorder_ = nullptr;
  uint64_t id_ = 0;
};

/// libtorch keeps its own instance of c10d's FlightRecorder hidden, so this is
/// another one, for this backend. Entries, dumps and variables are those of
/// c10d (FlightRecorder.hpp, version 2.10 of the format); dumps also say how
/// long an operation took. TORCH_FR_BUFFER_SIZE=0 switches it off. Thread-safe.
class FlightRecorder {
 public:
  /// Keeps the latest `capacity` entries.
  FlightRecorder(size_t capacity, bool stackOfCpp);
  ~FlightRecorder();
  /// Made at the first call, from the environment; never destroyed.
  static FlightRecorder& instance();

  bool enabled() const { return capacity_ > 0; }

  /// Global ranks of a group, for whoever compares the dumps of several ranks.
  void addGroup(const std::string& name, const std::vector<uint64_t>& ranks);

  /// Takes the GIL for the Python stack of a thread that Python knows, so the
  /// caller must hold no lock that a holder of the GIL waits for.
  FlightRecord begin(const FlightCall& call);

  /// A pickle. Stack traces take the GIL.
  std::string dump(bool stackTraces, bool onlyActive) const;
  /// Forgets all entries; groups stay known.
  void reset();

  /// Call it when a group fails. Writes a dump to a file on a thread of its
  /// own, once in a process, with torch's DebugInfoWriter, whose variables name
  /// the file: TORCH_FR_DUMP_TEMP_FILE and the global rank. It is written where
  /// TORCH_NCCL_DUMP_ON_TIMEOUT is 1, or where a file is named and that one is
  /// not 0.
  void dumpOnFailure(int globalRank);
  /// Waits for that file, without the GIL: before an error is raised, and
  /// before Python ends. False where it did not come within `timeout`.
  bool waitForDump(std::chrono::milliseconds timeout);

 private:
  friend class FlightRecord;

  struct Group {
    size_t id;
    std::string name;
    std::string description = "undefined";
    std::vector<uint64_t> ranks;
    uint64_t lastCollective = 0;
    uint64_t lastPointToPoint = 0;
    /// -1: none, as in c10d.
    int64_t lastEnqueued = -1;
    int64_t lastCompleted = -1;
  };
  struct Entry;

  /// Called under the lock.
  Group& group(const std::string& name);
  void end(uint64_t id, bool completed);
  void writeGroups(PickleWriter& out) const;
  void writeFile(int globalRank);

  const size_t capacity_;
  const bool stackOfCpp_;

  mutable std::mutex mutex_;
  std::map<std::string, std::unique_ptr<Group>> groups_;
  /// Ids are consecutive.
  std::deque<std::unique_ptr<Entry>> entries_;
  uint64_t nextId_ = 0;

  std::mutex dumpMutex_;
  std::condition_variable dumped_;
  enum class Dump { kNone, kRunning, kWritten } dump_ = Dump::kNone;
};

}  // namespace automoe
