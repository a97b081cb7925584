// SPDX-License-Identifier: Apache-2.0
// Reduce, all-reduce, reduce-scatter.
#include <vector>

#include "process_group/common/error.hpp"
#include "process_group/exchange/schedule_parts.hpp"
#include "process_group/exchange/schedule_sums.hpp"
#include "process_group/exchange/schedules.hpp"

namespace automoe {
namespace {

constexpr uint32_t kUp = 0;    // slot of what is to be summed
constexpr uint32_t kDown = 1;  // slot of a sum

struct Call {
  const Topology& topology;
  const std::byte* from;
  std::byte* to;
  uint64_t bytes;
};

void checkElements(const kernels::Reduction& reduction, uint64_t bytes) {
  const std::size_t each = kernels::elementBytes(reduction.type);
  AUTOMOE_CHECK(
      bytes % each == 0,
      bytes,
      " bytes are no whole number of ",
      kernels::nameOf(reduction.type));
}

// Each of `ranks`, of which this is one, sends its array to the others and
// sums all in order.
Sums::Array addMutualSum(
    Schedule& schedule,
    Sums& sums,
    const Call& call,
    std::span<const int> ranks,
    Sums::Array own) {
  std::vector<Schedule::Id> sends;
  for (const int rank : ranks) {
    if (rank == call.topology.rank()) {
      continue;
    }
    sends.push_back(schedule.send(rank, kUp, own.data, call.bytes, own.after));
  }
  if (own.data == call.to) {
    own.after.insert(own.after.end(), sends.begin(), sends.end());
  }
  return sums.add(ranks, kUp, own, {call.to, call.bytes, true}, sums.ofNodes());
}

// Up a binomial tree over the nodes to leaders[0], where the sum goes to `to`.
Sums::Array addTreeUp(
    Sums& sums,
    const Call& call,
    std::span<const int> leaders,
    const Sums::Array& own,
    std::byte* to) {
  const int node = call.topology.node();
  const auto leaderOf = [&](int n) {
    return leaders[static_cast<std::size_t>(n)];
  };
  std::vector<int> ranks{call.topology.rank()};
  for (const int child : treeChildren(node, call.topology.numNodes())) {
    ranks.push_back(leaderOf(child));
  }
  const bool top = node == 0;
  const Sums::Array sum = sums.add(
      ranks, kUp, own, {top ? to : nullptr, call.bytes, top}, sums.ofNodes());
  if (!top) {
    sums.send(leaderOf(treeParent(node)), kUp, sum, call.bytes);
  }
  return sum;
}

std::vector<int> firstRanks(const Topology& topology) {
  std::vector<int> ranks;
  for (int node = 0; node < topology.numNodes(); ++node) {
    ranks.push_back(topology.ranksOf(node)[0]);
  }
  return ranks;
}

// Over the first rank of every node. A rank's `to` may be its `from` here and
// below: the sum comes to where its part was only after it has been read, as
// it is in the sum; and what this rank itself writes there comes after what
// reads it here.
void addSmallAllReduce(Schedule& schedule, const Call& call) {
  const Topology& topology = call.topology;
  Sums sums(schedule, topology);
  if (topology.size() == 2) {
    addMutualSum(schedule, sums, call, {{0, 1}}, {call.from});
    return;
  }
  const std::vector<int> leaders = firstRanks(topology);
  const int nodes = topology.numNodes();
  const bool oneNode = nodes == 1;
  const int leader = leaders[static_cast<std::size_t>(topology.node())];
  const bool leads = topology.rank() == leader;
  Sums::Array sum = sums.addNode(
      leader,
      kUp,
      {call.from},
      {oneNode ? call.to : nullptr, call.bytes, oneNode});
  if (nodes > kFewNodes) {
    if (leads) {
      sum = addTreeUp(sums, call, leaders, sum, call.to);
    }
    addTreeDown(
        schedule,
        topology,
        leaders,
        topology.node(),
        {kDown, call.to, call.bytes},
        sum.after);
    return;
  }
  if (!leads) {
    schedule.receive(leader, kDown, call.to, call.bytes);
    return;
  }
  if (!oneNode) {
    sum = addMutualSum(schedule, sums, call, leaders, sum);
  }
  sendToMates(schedule, topology, kDown, call.to, call.bytes, sum.after);
}

// A reduce-scatter and an all-gather, piece by piece.
void addLargeAllReduce(Schedule& schedule, const Call& call) {
  const Topology& topology = call.topology;
  Sums sums(schedule, topology);
  const std::vector<Range> shares = cutIntoShares(topology, call.bytes);
  const int next = nodeAfter(topology, topology.node(), 1);
  for (const auto& [rank, slot, range] :
       piecesOf(shares, ranksFromNode(topology, next))) {
    std::byte* to = call.to + range.begin;
    const Sums::Array sum = sums.addOnto(
        rank, 2 * slot + kUp, call.from + range.begin, to, range.bytes);
    addSpread(
        schedule,
        topology,
        {rank, 2 * slot + kDown, to, to, range.bytes},
        sum.after);
  }
}

// Beyond a few nodes: up the tree of the all-reduce, so that sums are the same
// whatever the root is, and from its top to the root.
void addSmallReduceOfMany(Schedule& schedule, const Call& call, int root) {
  const Topology& topology = call.topology;
  Sums sums(schedule, topology);
  std::vector<int> leaders = firstRanks(topology);
  leaders[static_cast<std::size_t>(topology.nodeOf(root))] = root;
  const int top = leaders[0];
  const int leader = leaders[static_cast<std::size_t>(topology.node())];
  const bool isRoot = topology.rank() == root;
  Sums::Array sum =
      sums.addNode(leader, kUp, {call.from}, {nullptr, call.bytes, false});
  if (topology.rank() == leader) {
    sum = addTreeUp(sums, call, leaders, sum, isRoot ? call.to : nullptr);
  }
  if (top == root) {
    return;
  }
  if (topology.rank() == top) {
    sums.send(root, kDown, sum, call.bytes);
  } else if (isRoot) {
    schedule.receive(top, kDown, call.to, call.bytes);
  }
}

// Every rank sums its share, in scratch, and sends it to the root; what is
// small is all the root's share.
void addReduce(Schedule& schedule, const Call& call, int root) {
  const Topology& topology = call.topology;
  Sums sums(schedule, topology);
  std::vector<Range> shares(static_cast<std::size_t>(topology.size()));
  if (call.bytes <= kSmallSum) {
    shares[static_cast<std::size_t>(root)] = {0, call.bytes};
  } else {
    shares = cutIntoShares(topology, call.bytes);
  }
  const bool isRoot = topology.rank() == root;
  const int next = nodeAfter(topology, topology.node(), 1);
  for (const auto& [rank, slot, range] :
       piecesOf(shares, ranksFromNode(topology, next))) {
    std::byte* to = isRoot ? call.to + range.begin : nullptr;
    const Sums::Array sum = sums.addOnto(
        rank, 2 * slot + kUp, call.from + range.begin, to, range.bytes);
    if (rank == root) {
      continue;
    }
    if (topology.rank() == rank) {
      sums.send(root, 2 * slot + kDown, sum, range.bytes);
    } else if (isRoot) {
      schedule.receive(rank, 2 * slot + kDown, to, range.bytes);
    }
  }
}

}  // namespace

Schedule makeReduce(
    const Topology& topology,
    const kernels::Reduction& reduction,
    int root,
    const std::byte* from,
    std::byte* to,
    uint64_t bytes) {
  checkRoot(topology, root);
  checkElements(reduction, bytes);
  Schedule schedule;
  if (bytes == 0) {
    return schedule;
  }
  const Call call{topology, from, to, bytes};
  if (bytes <= kSmallSum && topology.numNodes() > kFewNodes) {
    addSmallReduceOfMany(schedule, call, root);
  } else {
    addReduce(schedule, call, root);
  }
  return schedule;
}

Schedule makeAllReduce(
    const Topology& topology,
    const kernels::Reduction& reduction,
    const std::byte* from,
    std::byte* to,
    uint64_t bytes) {
  checkElements(reduction, bytes);
  Schedule schedule;
  if (bytes == 0) {
    return schedule;
  }
  const Call call{topology, from, to, bytes};
  if (bytes <= kSmallSum && topology.size() > 1) {
    addSmallAllReduce(schedule, call);
  } else {
    addLargeAllReduce(schedule, call);
  }
  return schedule;
}

Schedule makeReduceScatter(
    const Topology& topology,
    const kernels::Reduction& reduction,
    std::span<const ConstBlock> from,
    Block to) {
  AUTOMOE_CHECK(
      from.size() == static_cast<std::size_t>(topology.size()),
      from.size(),
      " blocks, ",
      topology.size(),
      " ranks");
  std::vector<Range> blocks;
  for (const ConstBlock& block : from) {
    checkElements(reduction, block.bytes);
    blocks.push_back({0, block.bytes});
  }
  const Range& own = blocks[static_cast<std::size_t>(topology.rank())];
  AUTOMOE_CHECK(
      own.bytes == to.bytes,
      "a rank's own block has ",
      own.bytes,
      " bytes as input and ",
      to.bytes,
      " as output");
  Schedule schedule;
  Sums sums(schedule, topology);
  const int next = nodeAfter(topology, topology.node(), 1);
  for (const auto& [rank, slot, range] :
       piecesOf(blocks, ranksFromNode(topology, next))) {
    sums.addOnto(
        rank,
        slot,
        from[static_cast<std::size_t>(rank)].data + range.begin,
        rank == topology.rank() ? to.data + range.begin : nullptr,
        range.bytes);
  }
  return schedule;
}

}  // namespace automoe
