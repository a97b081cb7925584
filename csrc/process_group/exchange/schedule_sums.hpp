// SPDX-License-Identifier: Apache-2.0
// Sums over the ranks of a node, and over nodes, in scratch that is used again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <vector>

#include "process_group/exchange/schedule.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe {

/// Memory for what arrives to be summed. Little of it, used in turns: it stays
/// in the cache, and a long sum needs no more than a short one.
class ScratchRing {
 public:
  struct Slot {
    std::byte* memory = nullptr;
    uint64_t bytes = 0;
    std::vector<Schedule::Id> users;  // come before the next use
  };

  explicit ScratchRing(Schedule& schedule) : schedule_(schedule) {}

  /// At least `bytes` of memory; its next use comes after the slot's users,
  /// which the caller replaces by its own.
  Slot& next(uint64_t bytes);

 private:
  Schedule& schedule_;
  std::deque<Slot> slots_;  // stay where they are
  uint64_t total_ = 0;
  std::size_t turn_ = 0;
};

/// Adds the steps of sums to a schedule.
///
/// Why waiting for scratch cannot end in a circle: let all ranks add their
/// pieces in the order of piecesOf(), own node last, so that what a rank sums
/// for others comes before what it sums for itself, piece by piece. A sum for
/// others waits, through scratch here, for earlier ones, and through scratch of
/// the rank it is sent to, for what that one sums for itself of an earlier
/// piece. A sum for itself waits for sums of others of the same piece. What a
/// rank gives to a mate waits for nothing.
class Sums {
 public:
  /// An array, the steps that it comes after, and where it lies if it lies in
  /// scratch.
  struct Array {
    const std::byte* data = nullptr;
    std::vector<Schedule::Id> after = {};
    ScratchRing::Slot* scratch = nullptr;
  };
  /// Where a sum goes (null: scratch), and whether it is the final one, which
  /// is divided.
  struct Goal {
    std::byte* to = nullptr;
    uint64_t bytes = 0;
    bool last = false;
  };

  Sums(Schedule& schedule, const Topology& topology);

  /// The sum of `own` and what the others of `ranks` send, in the order of
  /// `ranks`.
  Array add(
      std::span<const int> ranks,
      uint32_t slot,
      const Array& own,
      const Goal& goal,
      ScratchRing& ring);
  /// What this rank's node has at `from`, summed on `leader`, a rank of it.
  /// Without data elsewhere.
  Array addNode(int leader, uint32_t slot, const Array& from, const Goal& goal);
  /// What all ranks have at `from`, summed on `target`, over each node first
  /// and there on the one that stands for the target. Without data elsewhere.
  Array addOnto(
      int target,
      uint32_t slot,
      const std::byte* from,
      std::byte* to,
      uint64_t bytes);
  /// Sends an array, which is not needed otherwise.
  void send(int peer, uint32_t slot, const Array& array, uint64_t bytes);

  ScratchRing& ofNodes() { return nodes_; }

 private:
  Schedule& schedule_;
  const Topology& topology_;
  ScratchRing mates_;  // what comes from the own node
  ScratchRing nodes_;  // what comes from others
};

}  // namespace automoe
