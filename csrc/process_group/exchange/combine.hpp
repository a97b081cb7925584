// SPDX-License-Identifier: Apache-2.0
// Rows of experts back to their tokens, summed on the way.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "process_group/exchange/collective.hpp"
#include "process_group/exchange/partial_sums.hpp"
#include "process_group/exchange/token_sums.hpp"

namespace automoe {

/// Every rank of a node streams its rows through node memory to the landing
/// rank of their token's origin. That one sums them and sends one row per
/// token across the network, to the origin, which sums over nodes. By the
/// posting rule, bytes leave when their destination has posted, or ride ahead
/// of it while they are few.
class Combine final : public Collective {
 public:
  Combine(Group& group, uint64_t sequence);
  ~Combine() override;

  /// This rank's own call.
  void post(
      CombineArguments arguments,
      const Route& route,
      Clock::time_point deadline);

  bool hasPosted(int rank) const override { return peer(rank).posted; }
  void sourcePosted(
      const Record& record, std::span<const std::byte> payload) override;
  void chunkArrived(
      const Record& record, std::span<const std::byte> payload) override;
  void chunkStaged(const Record& record) override;
  void remind(Clock::time_point now) override;
  void abandon() override;
  std::string waitsFor() const override;

 private:
  /// Rows of a node-mate that lie in its node memory.
  struct Slot {
    Record record;
    uint64_t at = 0;  // bytes of it that are used
    uint64_t unitsLeft = 0;
  };
  struct Chunk {
    uint64_t first;  // row, of those for its destination
    uint32_t rows;
    std::string bytes;
  };
  /// What this rank has to do with another.
  struct Peer {
    bool posted = false;
    Record record;             // its kPosted, when posted
    uint64_t sendBytes = 0;    // sums for it, when it is of another node
    std::deque<Chunk> chunks;  // made, not sent
    std::shared_ptr<RowStream> stream;  // own rows for it, when it is a mate
    uint64_t rode = 0;                  // bytes sent ahead of its record
    bool started = false;               // what there is for it may leave
    bool deferred = false;              // our record leaves with the sums
    std::deque<Slot> slots;             // of a mate, by arrival
  };

  const Peer& peer(int rank) const { return peers_[static_cast<size_t>(rank)]; }
  Peer& peer(int rank) { return peers_[static_cast<size_t>(rank)]; }

  Record describe(int destination) const;
  /// What is to be sent to whom; a step for each, and one for the output.
  void prepare();
  /// Tells the ranks that wait for it that this one has posted. Few sums for a
  /// rail peer go with that record, when they are made.
  void announce();
  bool agrees(int rank);
  void settle(int rank);
  /// Sums or rows that go to a rank.
  uint64_t bytesFor(int rank) const;
  /// Lets the bytes for a rank leave, if they may.
  void start(int rank);
  void startSend(int rank);
  void startStream(int rank);
  /// Makes sums as long as the rows for them are there.
  void makeSums();
  bool unitReady() const;
  void makeUnit();
  void keep(int rank, Chunk chunk);
  void useSlot(int rank, uint64_t bytes);
  void takeChunk(const Record& record, std::span<const std::byte> payload);
  void outputProgressed();

  CombineArguments arguments_;
  std::optional<Route> route_;
  std::optional<PartialSums> partials_;
  std::optional<TokenSums> tokens_;
  std::vector<Peer> peers_;                            // by rank
  std::vector<std::pair<Record, std::string>> early_;  // before our call
  Clock::time_point postedAt_;
  uint64_t chunkBytes_ = 0;  // made, not sent
  bool outputDone_ = false;
};

}  // namespace automoe
