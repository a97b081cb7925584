// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/schedule_parts.hpp"

#include <algorithm>
#include <ranges>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

constexpr uint64_t kUnit = 64;

}  // namespace

void checkRoot(const Topology& topology, int root) {
  if (root < 0 || root >= topology.size()) {
    throw InvalidArgument(
        concat("root: got ", root, ", expected 0 <= root < ", topology.size()));
  }
}

std::vector<Range> cutEvenly(uint64_t bytes, uint64_t parts) {
  const uint64_t units = (bytes + kUnit - 1) / kUnit;
  const uint64_t each = units / parts;
  const uint64_t oneMore = units % parts;  // of the parts
  std::vector<Range> ranges;
  ranges.reserve(parts);
  uint64_t begin = 0;
  for (uint64_t part = 0; part < parts; ++part) {
    const uint64_t length = (each + (part < oneMore ? 1 : 0)) * kUnit;
    ranges.push_back({begin, std::min(length, bytes - begin)});
    begin += ranges.back().bytes;
  }
  return ranges;
}

std::vector<Range> cutIntoPieces(uint64_t bytes) {
  if (bytes == 0) {
    return {};
  }
  const uint64_t pieces = (bytes + kPieceBytes - 1) / kPieceBytes;
  return cutEvenly(bytes, std::min(pieces, kMaxPieces));
}

std::vector<Range> cutIntoShares(
    const Topology& topology, uint64_t bytes, int exceptNode) {
  std::vector<Range> shares(static_cast<std::size_t>(topology.size()));
  const int nodes = topology.numNodes() - (exceptNode < 0 ? 0 : 1);
  const std::vector<Range> ofNodes =
      cutEvenly(bytes, static_cast<uint64_t>(nodes));
  auto next = ofNodes.begin();
  for (int node = 0; node < topology.numNodes(); ++node) {
    if (node == exceptNode) {
      continue;
    }
    const std::span<const int> ranks = topology.ranksOf(node);
    const std::vector<Range> ofRanks = cutEvenly(next->bytes, ranks.size());
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      shares[static_cast<std::size_t>(ranks[i])] = {
          next->begin + ofRanks[i].begin, ofRanks[i].bytes};
    }
    ++next;
  }
  return shares;
}

std::vector<Piece> piecesOf(
    std::span<const Range> blocks, std::span<const int> ranks) {
  std::vector<std::vector<Range>> cuts;
  cuts.reserve(ranks.size());
  std::size_t most = 0;
  for (const int rank : ranks) {
    const Range& block = blocks[static_cast<std::size_t>(rank)];
    cuts.push_back(cutIntoPieces(block.bytes));
    most = std::max(most, cuts.back().size());
  }
  std::vector<Piece> pieces;
  for (std::size_t number = 0; number < most; ++number) {
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      if (number >= cuts[i].size()) {
        continue;
      }
      const auto rank = static_cast<std::size_t>(ranks[i]);
      const auto slot = static_cast<uint32_t>(rank * kMaxPieces + number);
      const Range& cut = cuts[i][number];
      pieces.push_back(
          {ranks[i], slot, {blocks[rank].begin + cut.begin, cut.bytes}});
    }
  }
  return pieces;
}

std::vector<int> ranksFromNode(const Topology& topology, int node) {
  std::vector<int> ranks;
  ranks.reserve(static_cast<std::size_t>(topology.size()));
  for (int distance = 0; distance < topology.numNodes(); ++distance) {
    const std::span<const int> more =
        topology.ranksOf(nodeAfter(topology, node, distance));
    ranks.insert(ranks.end(), more.begin(), more.end());
  }
  return ranks;
}

int nodeAfter(const Topology& topology, int node, int distance) {
  return (node + distance) % topology.numNodes();
}

std::vector<int> standInsOf(const Topology& topology, int rank) {
  std::vector<int> ranks;
  ranks.reserve(static_cast<std::size_t>(topology.numNodes()));
  for (int node = 0; node < topology.numNodes(); ++node) {
    ranks.push_back(topology.railPeerOf(rank, node));
  }
  return ranks;
}

int treeParent(int number) {
  return number & (number - 1);
}

std::vector<int> treeChildren(int number, int count) {
  const int below = number == 0 ? count : number & -number;
  std::vector<int> children;
  for (int step = 1; step < below && number + step < count; step *= 2) {
    children.push_back(number + step);
  }
  return children;
}

void sendToMates(
    Schedule& schedule,
    const Topology& topology,
    uint32_t slot,
    const std::byte* from,
    uint64_t bytes,
    Schedule::After after) {
  for (const int mate : topology.ranksOf(topology.node())) {
    if (mate != topology.rank()) {
      schedule.send(mate, slot, from, bytes, after);
    }
  }
}

void addTreeDown(
    Schedule& schedule,
    const Topology& topology,
    std::span<const int> leaders,
    int number,
    const Message& message,
    Schedule::After after) {
  const auto& [slot, data, bytes] = message;
  const auto leaderOf = [&](int n) {
    return leaders[static_cast<std::size_t>(n)];
  };
  const int rank = topology.rank();
  const bool leads = rank == leaderOf(number);
  std::vector<Schedule::Id> here(after.begin(), after.end());
  if (rank != leaderOf(0)) {
    const int giver = leaderOf(leads ? treeParent(number) : number);
    here = {schedule.receive(giver, slot, data, bytes)};
  }
  if (!leads) {
    return;
  }
  // Those with most nodes below them first.
  const auto count = static_cast<int>(leaders.size());
  for (const int child : treeChildren(number, count) | std::views::reverse) {
    schedule.send(leaderOf(child), slot, data, bytes, here);
  }
  sendToMates(schedule, topology, slot, data, bytes, here);
}

void addSpread(
    Schedule& schedule,
    const Topology& topology,
    const Parcel& parcel,
    Schedule::After after,
    int exceptNode) {
  const int rank = topology.rank();
  const auto& [source, slot, from, to, bytes] = parcel;
  if (rank == source) {
    for (int distance = 1; distance < topology.numNodes(); ++distance) {
      const int node = nodeAfter(topology, topology.node(), distance);
      if (node != exceptNode) {
        schedule.send(topology.railPeer(node), slot, from, bytes, after);
      }
    }
    sendToMates(schedule, topology, slot, from, bytes, after);
    return;
  }
  const int standIn = topology.railPeerOf(source, topology.node());
  const int giver = rank == standIn ? source : standIn;
  const Schedule::Id received = schedule.receive(giver, slot, to, bytes);
  if (rank == standIn) {
    sendToMates(schedule, topology, slot, to, bytes, {{received}});
  }
}

}  // namespace automoe
