// SPDX-License-Identifier: Apache-2.0
// Every rank has something for every node: it crosses the network once per
// node, and all ranks of the node take from it what is theirs.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "process_group/exchange/collective.hpp"

namespace automoe {

/// Carries the casts; what is in them is a subclass's business.
///
/// To another node a cast goes to the rail peer, whose engine puts each chunk
/// into its node memory and tells its node-mates where it lies; the last one
/// who is done with it frees it. To the own node the source itself does so.
/// By the posting rule a small cast rides with the record, a larger one
/// leaves when all ranks of its node have posted.
class Multicast : public Collective {
 public:
  Multicast(Group& group, uint64_t sequence, OperationKind kind);

  bool hasPosted(int rank) const override { return source(rank).posted; }
  void sourcePosted(
      const Record& record, std::span<const std::byte> payload) override;
  void chunkStaged(const Record& record) override;
  void castArrived(
      const Record& record, std::span<const std::byte> payload) override;
  void abandon() override;
  std::string waitsFor() const override;

 protected:
  /// Posts the own casts, once the subclass can answer what follows. Beside
  /// them there are `ownSteps` that the subclass counts.
  void postCasts(Clock::time_point deadline, uint64_t ownSteps = 0);

  /// Bytes of another rank's cast for this node, once its chunks come.
  uint64_t announcedBytes(int rank) const {
    return source(rank).record.sendBytes;
  }

  /// All bytes for a node.
  virtual uint64_t castBytes(int node) const = 0;
  /// Bytes of the largest row: no chunk is cut inside a row.
  virtual size_t largestRow() const = 0;
  /// Sets offset and rows of the chunk that begins at row `next`, at most
  /// `room` bytes unless one row is larger; returns its bytes.
  virtual size_t nextChunk(
      int node, uint64_t next, size_t room, Record& chunk) const = 0;
  /// Writes the bytes of that chunk.
  virtual void fill(int node, const Record& chunk, std::byte* to) const = 0;
  /// A chunk of another rank's cast, in order; valid during the call only.
  virtual void take(
      int source, const Record& chunk, std::span<const std::byte> bytes) = 0;
  /// Fills in what all ranks must agree on.
  virtual void describe(Record& record) const = 0;
  /// Empty when a record of another rank agrees with ours.
  virtual std::string disagreement(const Record& theirs) const = 0;

 private:
  struct Source {
    bool posted = false;
    bool received = false;
    bool held = false;  // its payload is in an extent that we have not read
    Record record;      // its kPosted, when posted
    std::string kept;   // an inline payload that came before our call
    uint64_t got = 0;   // bytes
  };
  /// What goes to one node.
  struct Cast {
    int unposted = 0;      // ranks there that have not posted
    bool waits = false;    // it leaves when they have
    size_t unmatched = 0;  // bytes that rode before they had
    uint64_t nextRow = 0;  // of what leaves in chunks
  };

  const Source& source(int rank) const {
    return sources_[static_cast<size_t>(rank)];
  }
  Source& source(int rank) { return sources_[static_cast<size_t>(rank)]; }
  Cast& cast(int node) { return casts_[static_cast<size_t>(node)]; }

  Record postedRecord(int destination, int node) const;
  void postToMates();
  bool rideToMates(Record record);
  void postToNode(int node);
  bool agrees(int rank);
  void settle(int rank);
  void nodeHasPosted(int node);
  void streamToNode(int node);
  void streamToMates();
  void takePosted(int rank, std::span<const std::byte> payload);
  void arrived(int rank, const Record& chunk, std::span<const std::byte> bytes);
  void readExtent(const Record& chunk);
  void received(int rank);

  std::vector<Source> sources_;
  std::vector<Cast> casts_;
};

}  // namespace automoe
