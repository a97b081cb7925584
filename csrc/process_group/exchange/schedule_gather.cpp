// SPDX-License-Identifier: Apache-2.0
// Gather, scatter, all-gather.
#include <vector>

#include "process_group/common/error.hpp"
#include "process_group/exchange/schedule_parts.hpp"
#include "process_group/exchange/schedules.hpp"

namespace automoe {
namespace {

// Of a rank's own block; nothing where it lies there already.
void addCopy(Schedule& schedule, ConstBlock from, Block to) {
  AUTOMOE_CHECK(
      from.bytes == to.bytes,
      "a rank's own block has ",
      from.bytes,
      " bytes as input and ",
      to.bytes,
      " as output");
  if (from.data == to.data) {
    return;
  }
  for (const Range& piece : cutIntoPieces(from.bytes)) {
    schedule.copy(to.data + piece.begin, from.data + piece.begin, piece.bytes);
  }
}

void addSend(Schedule& schedule, int peer, ConstBlock from) {
  uint32_t slot = 0;
  for (const Range& piece : cutIntoPieces(from.bytes)) {
    schedule.send(peer, slot++, from.data + piece.begin, piece.bytes);
  }
}

void addReceive(Schedule& schedule, int peer, Block to) {
  uint32_t slot = 0;
  for (const Range& piece : cutIntoPieces(to.bytes)) {
    schedule.receive(peer, slot++, to.data + piece.begin, piece.bytes);
  }
}

void checkBlocks(const Topology& topology, std::size_t blocks) {
  AUTOMOE_CHECK(
      blocks == static_cast<std::size_t>(topology.size()),
      blocks,
      " blocks, ",
      topology.size(),
      " ranks");
}

}  // namespace

Schedule makeGather(
    const Topology& topology,
    int root,
    ConstBlock from,
    std::span<const Block> to) {
  checkRoot(topology, root);
  Schedule schedule;
  if (topology.rank() != root) {
    addSend(schedule, root, from);
    return schedule;
  }
  checkBlocks(topology, to.size());
  for (const int rank : ranksFromNode(topology, topology.node())) {
    if (rank != root) {
      addReceive(schedule, rank, to[static_cast<std::size_t>(rank)]);
    }
  }
  addCopy(schedule, from, to[static_cast<std::size_t>(root)]);
  return schedule;
}

Schedule makeScatter(
    const Topology& topology,
    int root,
    std::span<const ConstBlock> from,
    Block to) {
  checkRoot(topology, root);
  Schedule schedule;
  if (topology.rank() != root) {
    addReceive(schedule, root, to);
    return schedule;
  }
  checkBlocks(topology, from.size());
  // What crosses the network first; it takes longest.
  const int next = nodeAfter(topology, topology.node(), 1);
  for (const int rank : ranksFromNode(topology, next)) {
    if (rank != root) {
      addSend(schedule, rank, from[static_cast<std::size_t>(rank)]);
    }
  }
  addCopy(schedule, from[static_cast<std::size_t>(root)], to);
  return schedule;
}

Schedule makeAllGather(
    const Topology& topology, ConstBlock from, std::span<const Block> to) {
  checkBlocks(topology, to.size());
  Schedule schedule;
  std::vector<Range> blocks;
  blocks.reserve(to.size());
  for (const Block& block : to) {
    blocks.push_back({0, block.bytes});
  }
  const std::vector<int> ranks = ranksFromNode(topology, topology.node());
  for (const auto& [rank, slot, range] : piecesOf(blocks, ranks)) {
    const std::byte* given =
        rank == topology.rank() ? from.data + range.begin : nullptr;
    std::byte* data = to[static_cast<std::size_t>(rank)].data + range.begin;
    addSpread(schedule, topology, {rank, slot, given, data, range.bytes}, {});
  }
  addCopy(schedule, from, to[static_cast<std::size_t>(topology.rank())]);
  return schedule;
}

}  // namespace automoe
