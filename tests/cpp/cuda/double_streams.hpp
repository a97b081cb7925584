// SPDX-License-Identifier: Apache-2.0
// Streams of the test double: queues that one thread works off in an order
// drawn at random among all that devices may choose.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "process_group/device/device.hpp"

namespace automoe::testing {

class DoubleGraph;
struct DoubleStream;

struct StreamItem {
  /// What it does or waits for, for texts.
  std::function<std::string()> what;
  /// Empty: always.
  std::function<bool()> ready = {};
  /// True when it is done; else it is called again when it is ready.
  std::function<bool()> step = [] { return true; };
  /// Only kernels run without the lock: what they do may take long.
  bool locked = true;
  /// Of one that is not the same each time a graph runs: makes it anew, for the
  /// stream that is to run it.
  std::function<StreamItem(const std::shared_ptr<DoubleStream>&)> again = {};
};

struct DoubleStream {
  int rank = 0;
  uint64_t number = 0;
  uint64_t enqueued = 0;
  uint64_t done = 0;
  bool destroyed = false;
  std::deque<StreamItem> items = {};
  /// Of a node of a graph: all that it comes after is done. Empty: always.
  std::function<bool()> gate = {};

  using Nodes = std::set<size_t>;
  /// What it gets is recorded there; null: it is in no capture.
  std::shared_ptr<DoubleGraph> capture = nullptr;
  bool beganCapture = false;
  Nodes tips = {};  // which the next node comes after
};

/// The caller holds mutex() in all calls but stop(). ready() and step() are
/// called with it held.
class DoubleStreams {
 public:
  using Lock = std::unique_lock<std::mutex>;
  using Clock = std::chrono::steady_clock;

  DoubleStreams(int ranks, unsigned seed);
  ~DoubleStreams();

  std::mutex& mutex() { return mutex_; }

  Device::Stream make(int rank);
  void destroy(int rank, Device::Stream stream);
  /// A null stream is the rank's default stream.
  std::shared_ptr<DoubleStream> find(int rank, Device::Stream stream) const;
  std::vector<std::string> leaks(int rank) const;
  /// For one item; it goes when that is done.
  std::shared_ptr<DoubleStream> makeForNode(
      int rank, std::function<bool()> gate);
  /// The captures that streams of the rank are in.
  std::set<std::shared_ptr<DoubleGraph>> captures(int rank) const;
  /// Its streams are in no capture any more.
  void endCapture(const std::shared_ptr<DoubleGraph>& graph);

  void enqueue(DoubleStream& stream, StreamItem item);
  /// Something that items look at has changed.
  void touch();
  void stall(int rank, bool stalled);
  bool stalled(int rank) const { return stalled_[static_cast<size_t>(rank)]; }
  bool empty(int rank) const;
  size_t draw(size_t count) { return random_() % count; }

  /// Throws DeviceError where no stream can move for as long as `patience`.
  void wait(Lock& lock, const std::string& what, std::function<bool()> done);
  /// Whether it may begin what it has next.
  bool open(const DoubleStream& stream) const {
    return !stalled(stream.rank) && (!stream.gate || stream.gate());
  }
  /// Until no item can run.
  void settle(Lock& lock);
  void setPatience(Clock::duration patience) { patience_ = patience; }
  /// What the head of each stream waits for; empty where an item can run.
  std::string deadlock() const;
  /// Called with what a step threw.
  void onError(std::function<void(int rank, const std::string&)> handler) {
    onError_ = std::move(handler);
  }
  void onDone(std::function<void(int rank)> handler) {
    onDone_ = std::move(handler);
  }
  /// Drops what is enqueued.
  void stop();

 private:
  enum class Choice {
    kAny,
    kNewestStream,
    kOldestStream,
    kSameStream,
    kLateRank,
    kLateStreams,
    kCount,
  };
  using Streams = std::vector<std::shared_ptr<DoubleStream>>;

  std::shared_ptr<DoubleStream> add(int rank);
  bool ready(const DoubleStream& stream) const;
  Streams readyStreams() const;
  bool late(const DoubleStream& stream) const;
  std::shared_ptr<DoubleStream> choose(Streams streams);
  Clock::time_point startsAt() const;
  void work();
  void runOne(Lock& lock, const std::shared_ptr<DoubleStream>& stream);

  mutable std::mutex mutex_;
  std::condition_variable wake_;   // the thread
  std::condition_variable moved_;  // who waits for it
  std::map<uint64_t, std::shared_ptr<DoubleStream>> streams_;
  std::vector<bool> stalled_;
  uint64_t nextNumber_ = 0;
  std::mt19937 random_;
  Choice choice_;
  unsigned salt_;
  size_t mostQueued_;
  size_t queued_ = 0;
  uint64_t last_ = 0;
  std::list<std::function<bool()>> waiters_;  // is it done?
  bool stopping_ = false;
  Clock::duration patience_ = std::chrono::seconds(10);
  Clock::time_point hostMoved_ = Clock::now();
  Clock::time_point worldMoved_ = Clock::now();
  Clock::time_point lagFrom_ = Clock::now();
  std::function<void(int, const std::string&)> onError_;
  std::function<void(int)> onDone_;
  std::thread thread_;
};

}  // namespace automoe::testing
