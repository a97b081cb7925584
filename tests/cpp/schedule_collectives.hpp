// SPDX-License-Identifier: Apache-2.0
// Every collective, run once: its inputs, what must come out, who waits for
// nobody; and what has crossed between nodes.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "process_group/exchange/schedules.hpp"
#include "schedule_calls.hpp"
#include "schedule_world.hpp"

namespace automoe::testing {

inline ScheduleWorld broadcast(
    const Layout& layout, uint64_t bytes, const Variant& variant) {
  Call call(layout, variant);
  const Bytes sent = call.numbersOf(bytes, 0);
  for (std::size_t rank = 0; rank < call.ranks(); ++rank) {
    std::byte* data = call.isRoot(rank) ? call.input(sent) : call.output(sent);
    call.add(makeBroadcast(call.topology(rank), variant.root, data, bytes));
    EXPECT_TRUE(!call.isRoot(rank) || call.waitsForNobody(rank));
  }
  return call.run();
}

inline ScheduleWorld gather(
    const Layout& layout, uint64_t bytes, const Variant& variant) {
  Call call(layout, variant);
  for (std::size_t rank = 0; rank < call.ranks(); ++rank) {
    const uint64_t own = call.blockBytes(bytes, rank);
    const Bytes mine = call.numbersOf(own, rank);
    std::vector<Block> to;
    for (std::size_t r = 0; call.isRoot(rank) && r < call.ranks(); ++r) {
      const Bytes given = call.numbersOf(call.blockBytes(bytes, r), r);
      const bool placed = variant.inPlace && r == rank;
      to.push_back(
          {placed ? call.input(given) : call.output(given), given.size()});
    }
    const bool placed = variant.inPlace && call.isRoot(rank);
    const ConstBlock from{placed ? to[rank].data : call.input(mine), own};
    call.add(makeGather(call.topology(rank), variant.root, from, to));
    EXPECT_TRUE(call.isRoot(rank) || call.waitsForNobody(rank));
  }
  return call.run();
}

inline ScheduleWorld scatter(
    const Layout& layout, uint64_t bytes, const Variant& variant) {
  Call call(layout, variant);
  for (std::size_t rank = 0; rank < call.ranks(); ++rank) {
    const uint64_t own = call.blockBytes(bytes, rank);
    const Bytes mine = call.numbersOf(own, 0, rank);
    std::vector<ConstBlock> from;
    for (std::size_t r = 0; call.isRoot(rank) && r < call.ranks(); ++r) {
      const Bytes given = call.numbersOf(call.blockBytes(bytes, r), 0, r);
      from.push_back({call.input(given), given.size()});
    }
    Block to{nullptr, own};
    if (variant.inPlace && call.isRoot(rank)) {
      to.data = const_cast<std::byte*>(from[rank].data);
    } else {
      to.data = call.output(mine);
    }
    call.add(makeScatter(call.topology(rank), variant.root, from, to));
    EXPECT_TRUE(!call.isRoot(rank) || call.waitsForNobody(rank));
  }
  return call.run();
}

inline ScheduleWorld allGather(
    const Layout& layout, uint64_t bytes, const Variant& variant) {
  Call call(layout, variant);
  for (std::size_t rank = 0; rank < call.ranks(); ++rank) {
    const uint64_t own = call.blockBytes(bytes, rank);
    std::vector<Block> to;
    for (std::size_t r = 0; r < call.ranks(); ++r) {
      const Bytes given = call.numbersOf(call.blockBytes(bytes, r), r);
      const bool placed = variant.inPlace && r == rank;
      to.push_back(
          {placed ? call.input(given) : call.output(given), given.size()});
    }
    const Bytes mine = call.numbersOf(own, rank);
    const ConstBlock from{
        variant.inPlace ? to[rank].data : call.input(mine), own};
    call.add(makeAllGather(call.topology(rank), from, to));
  }
  return call.run();
}

// What every rank gives to a sum, and the sum.
struct Numbers {
  std::vector<Bytes> given;
  Bytes sum;

  Numbers(
      const Layout& layout,
      uint64_t bytes,
      const Call& call,
      const Variant& variant) {
    for (std::size_t rank = 0; rank < call.ranks(); ++rank) {
      given.push_back(call.numbersOf(bytes, rank));
    }
    const bool tree =
        bytes <= kSmallSum && call.topology(0).numNodes() > kFewNodes;
    sum = expectedSum(layout, variant.reduction, given, tree);
  }
};

inline ScheduleWorld reduce(
    const Layout& layout, uint64_t bytes, const Variant& variant) {
  Call call(layout, variant);
  const Numbers numbers(layout, bytes, call, variant);
  for (std::size_t rank = 0; rank < call.ranks(); ++rank) {
    const Bytes& given = numbers.given[rank];
    const std::byte* from = nullptr;
    std::byte* to = nullptr;
    if (call.isRoot(rank)) {
      to = variant.inPlace ? call.output(given, numbers.sum)
                           : call.output(numbers.sum);
      from = variant.inPlace ? to : call.input(given);
    } else {
      // What it gives stays as it is.
      std::byte* data = call.input(given);
      from = data;
      to = variant.inPlace ? data : nullptr;
    }
    call.add(makeReduce(
        call.topology(rank), variant.reduction, variant.root, from, to, bytes));
    const bool few = call.topology(rank).numNodes() <= kFewNodes;
    if (bytes <= kSmallSum && few && !call.isRoot(rank)) {
      EXPECT_TRUE(call.waitsForNobody(rank, false));
    }
  }
  return call.run();
}

inline ScheduleWorld allReduce(
    const Layout& layout, uint64_t bytes, const Variant& variant) {
  Call call(layout, variant);
  const Numbers numbers(layout, bytes, call, variant);
  for (std::size_t rank = 0; rank < call.ranks(); ++rank) {
    const Bytes& given = numbers.given[rank];
    std::byte* to = variant.inPlace ? call.output(given, numbers.sum)
                                    : call.output(numbers.sum);
    const std::byte* from = variant.inPlace ? to : call.input(given);
    call.add(
        makeAllReduce(call.topology(rank), variant.reduction, from, to, bytes));
  }
  return call.run();
}

inline ScheduleWorld reduceScatter(
    const Layout& layout, uint64_t bytes, const Variant& variant) {
  Call call(layout, variant);
  for (std::size_t rank = 0; rank < call.ranks(); ++rank) {
    std::vector<Bytes> given;
    for (std::size_t r = 0; r < call.ranks(); ++r) {
      given.push_back(call.numbersOf(call.blockBytes(bytes, rank), r, rank));
    }
    const Bytes sum = expectedSum(layout, variant.reduction, given);
    std::vector<ConstBlock> from;
    Block to{nullptr, sum.size()};
    for (std::size_t r = 0; r < call.ranks(); ++r) {
      const Bytes mine = call.numbersOf(call.blockBytes(bytes, r), rank, r);
      if (variant.inPlace && r == rank) {
        to.data = call.output(mine, sum);
        from.push_back({to.data, mine.size()});
      } else {
        from.push_back({call.input(mine), mine.size()});
      }
    }
    if (!variant.inPlace) {
      to.data = call.output(sum);
    }
    call.add(
        makeReduceScatter(call.topology(rank), variant.reduction, from, to));
  }
  return call.run();
}

// Bytes between two nodes.
inline uint64_t crossed(
    const ScheduleWorld& world, const Topology& topology, int from, int to) {
  uint64_t bytes = 0;
  for (const int source : topology.ranksOf(from)) {
    for (const int target : topology.ranksOf(to)) {
      bytes += from == to ? 0 : world.crossed(source, target);
    }
  }
  return bytes;
}
inline uint64_t crossedFrom(
    const ScheduleWorld& world, const Topology& topology, int node) {
  uint64_t bytes = 0;
  for (int other = 0; other < topology.numNodes(); ++other) {
    bytes += crossed(world, topology, node, other);
  }
  return bytes;
}
inline uint64_t crossedTo(
    const ScheduleWorld& world, const Topology& topology, int node) {
  uint64_t bytes = 0;
  for (int other = 0; other < topology.numNodes(); ++other) {
    bytes += crossed(world, topology, other, node);
  }
  return bytes;
}

}  // namespace automoe::testing
