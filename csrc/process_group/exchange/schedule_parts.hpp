// SPDX-License-Identifier: Apache-2.0
// What the schedules have in common: how they cut memory, in which order they
// go through the ranks, and the way of one piece from its rank to all others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "process_group/exchange/schedule.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe {

// Up to here a broadcast goes down a tree whole, and a sum goes to one rank of
// a node whole: messages cost more than bytes.
constexpr uint64_t kSmallBroadcast = 64 << 10;
constexpr uint64_t kSmallSum = 16 << 10;
// Up to so many nodes, a small sum goes from each node to each that needs it.
constexpr int kFewNodes = 8;
// A piece is what moves at once, so that one follows the other through the
// steps and other work of the process comes in between.
constexpr uint64_t kPieceBytes = 256 << 10;
constexpr uint64_t kMaxPieces = 64;  // of a block; longer blocks, longer pieces

/// Throws InvalidArgument unless it is a rank.
void checkRoot(const Topology& topology, int root);

struct Range {
  uint64_t begin = 0;
  uint64_t bytes = 0;
};

/// `parts` ranges, one after the other, of about equal size; some are empty if
/// there are few bytes. They begin at multiples of 64, so elements stay whole.
std::vector<Range> cutEvenly(uint64_t bytes, uint64_t parts);
/// The pieces of a block; none if it is empty.
std::vector<Range> cutIntoPieces(uint64_t bytes);
/// A range for each rank: as much for one node as for another, and within a
/// node as much for one rank as for another. Empty on `exceptNode`.
std::vector<Range> cutIntoShares(
    const Topology& topology, uint64_t bytes, int exceptNode = -1);

/// A piece of the block of a rank.
struct Piece {
  int rank = -1;
  uint32_t slot = 0;  // its own among all pieces, the same on every rank
  Range range;
};

/// First the first piece of every block, in the order of `ranks`, then all
/// second ones, and so on. blocks[r] is the block of rank r.
std::vector<Piece> piecesOf(
    std::span<const Range> blocks, std::span<const int> ranks);

/// All ranks, node after node, beginning with those of `node`.
std::vector<int> ranksFromNode(const Topology& topology, int node);
/// (node + distance) modulo the number of nodes.
int nodeAfter(const Topology& topology, int node, int distance);
/// Where `rank` stands on every node: itself on its own, its rail peer on each
/// other one.
std::vector<int> standInsOf(const Topology& topology, int rank);

/// Binomial tree over 0, ..., count - 1 with root 0. What is below a node are
/// the numbers that follow it, so sums in the order of children ascend.
int treeParent(int number);
std::vector<int> treeChildren(int number, int count);

/// To every other rank of this node.
void sendToMates(
    Schedule& schedule,
    const Topology& topology,
    uint32_t slot,
    const std::byte* from,
    uint64_t bytes,
    Schedule::After after);

/// In the same place on every rank.
struct Message {
  uint32_t slot = 0;
  std::byte* data = nullptr;
  uint64_t bytes = 0;
};

/// From leaders[0] down a binomial tree over `leaders`, one for each node, and
/// from each leader to its mates. leaders[number] leads this rank's node.
/// `after` is what must have come before on leaders[0].
void addTreeDown(
    Schedule& schedule,
    const Topology& topology,
    std::span<const int> leaders,
    int number,
    const Message& message,
    Schedule::After after);

/// On its way from `rank` to all.
struct Parcel {
  int rank = -1;
  uint32_t slot = 0;
  const std::byte* from = nullptr;  // on `rank`
  std::byte* to = nullptr;          // elsewhere
  uint64_t bytes = 0;
};

/// From the rank to its mates and, once for each other node but `exceptNode`,
/// to the one that stands for it there, which passes it on to its mates.
/// `after` is what must have come before on the rank of the parcel.
void addSpread(
    Schedule& schedule,
    const Topology& topology,
    const Parcel& parcel,
    Schedule::After after,
    int exceptNode = -1);

}  // namespace automoe
