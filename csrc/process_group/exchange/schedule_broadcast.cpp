// SPDX-License-Identifier: Apache-2.0
// Broadcast. The root waits for nobody: it receives nothing.
#include <algorithm>
#include <vector>

#include "process_group/exchange/schedule_parts.hpp"
#include "process_group/exchange/schedules.hpp"

namespace automoe {
namespace {

struct Call {
  const Topology& topology;
  int root;
  std::byte* data;
  uint64_t bytes;
};

// Down a tree of those that stand for the root on each node, from its node on.
void addTree(Schedule& schedule, const Call& call) {
  const Topology& topology = call.topology;
  const int nodes = topology.numNodes();
  const int rootNode = topology.nodeOf(call.root);
  std::vector<int> leaders = standInsOf(topology, call.root);
  std::ranges::rotate(leaders, leaders.begin() + rootNode);
  const int number = nodeAfter(topology, topology.node(), nodes - rootNode);
  uint32_t slot = 0;
  for (const Range& piece : cutIntoPieces(call.bytes)) {
    const Message message{slot++, call.data + piece.begin, piece.bytes};
    addTreeDown(schedule, topology, leaders, number, message, {});
  }
}

// Every rank of another node gets a share from the root and gives it to all
// nodes but the root's. So no link carries much more than the bytes once.
void addShares(Schedule& schedule, const Call& call) {
  const Topology& topology = call.topology;
  const int rootNode = topology.nodeOf(call.root);
  const std::vector<Range> shares =
      cutIntoShares(topology, call.bytes, rootNode);
  for (const auto& [rank, slot, range] :
       piecesOf(shares, ranksFromNode(topology, rootNode))) {
    std::byte* data = call.data + range.begin;
    if (topology.rank() == call.root) {
      schedule.send(rank, slot, data, range.bytes);
    }
    if (topology.node() == rootNode) {
      continue;
    }
    std::vector<Schedule::Id> here;
    if (topology.rank() == rank) {
      here.push_back(schedule.receive(call.root, slot, data, range.bytes));
    }
    addSpread(
        schedule,
        topology,
        {rank, slot, data, data, range.bytes},
        here,
        rootNode);
  }
  if (topology.node() != rootNode) {
    return;
  }
  uint32_t slot = 0;
  for (const Range& piece : cutIntoPieces(call.bytes)) {
    std::byte* data = call.data + piece.begin;
    if (topology.rank() == call.root) {
      sendToMates(schedule, topology, slot, data, piece.bytes, {});
    } else {
      schedule.receive(call.root, slot, data, piece.bytes);
    }
    ++slot;
  }
}

}  // namespace

Schedule makeBroadcast(
    const Topology& topology, int root, std::byte* data, uint64_t bytes) {
  checkRoot(topology, root);
  Schedule schedule;
  const Call call{topology, root, data, bytes};
  if (bytes <= kSmallBroadcast || topology.numNodes() == 1) {
    addTree(schedule, call);
  } else {
    addShares(schedule, call);
  }
  return schedule;
}

}  // namespace automoe
