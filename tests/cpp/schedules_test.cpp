// SPDX-License-Identifier: Apache-2.0
// The schedules of all collectives, on all kinds of layouts: right bytes in
// whatever order an engine runs them, no rank waits without need, and no byte
// crosses to a node twice.
#include "process_group/exchange/schedules.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "schedule_calls.hpp"
#include "schedule_collectives.hpp"
#include "schedule_world.hpp"

namespace automoe::testing {
namespace {

using enum ElementType;
using enum ReduceOperation;

constexpr unsigned kSeeds = 24;
constexpr uint64_t kLong = 600'007;        // several pieces
constexpr uint64_t kVeryLong = 9'000'004;  // more than scratch holds
// Around what is small to a mate, to another node, to a sum, to a broadcast.
const std::vector<uint64_t> kSizes = {
    0, 1, 999, 8192, 8193, 16376, 16384, 16392, 61441, 65536, 65537, kLong};
const std::vector<Reduction> kReductions = {
    {kFloat32, kSum, 1},
    {kBFloat16, kSum, 3},
    {kFloat16, kSum, 1},
    {kInt32, kSum, 1},
    {kBool, kSum, 1},
    {kFloat64, kProduct, 1},
    {kInt8, kSum, 5},
    {kFloat32, kSum, 7},
    {kUInt8, kBitAnd, 1},
    {kInt64, kBitXor, 1},
    {kBFloat16, kMax, 1},
};

Variant variantOf(const Layout& layout, unsigned seed) {
  Variant variant;
  variant.seed = seed;
  variant.root = static_cast<int>(seed * 7) % layout.size();
  variant.inPlace = seed / 4 % 2 == 1;
  variant.uneven = seed / 8 % 2 == 1;
  return variant;
}

// With one of the reductions, and whole elements.
Variant sumVariantOf(const Layout& layout, unsigned seed) {
  Variant variant = variantOf(layout, seed);
  variant.reduction = kReductions[seed % kReductions.size()];
  return variant;
}
uint64_t whole(uint64_t bytes, const Variant& variant) {
  const std::size_t each = kernels::elementBytes(variant.reduction.type);
  return (bytes + each - 1) / each * each;
}

using Collective = ScheduleWorld (*)(const Layout&, uint64_t, const Variant&);

// What a run of it moves: an array for each rank, or one block for each pair.
enum class Moves { kOne, kBlocks };

// Every layout, size and seed; fewer seeds where there is much to move.
void tryAll(Collective collective, Moves moves, bool sums) {
  for (const Layout& layout : kLayouts) {
    for (const uint64_t bytes : kSizes) {
      const auto ranks = static_cast<uint64_t>(layout.size());
      const uint64_t moved =
          bytes * ranks * (moves == Moves::kBlocks ? ranks : 1);
      if (moved > 40'000'000) {
        continue;
      }
      const unsigned step = moved < 300'000      ? 1
                            : moved < 2'000'000  ? 5
                            : moved < 10'000'000 ? 11
                                                 : kSeeds;
      for (unsigned seed = 3; seed < 3 + kSeeds; seed += step) {
        const Variant variant =
            sums ? sumVariantOf(layout, seed) : variantOf(layout, seed);
        collective(layout, sums ? whole(bytes, variant) : bytes, variant);
      }
    }
    if (::testing::Test::HasFailure()) {
      return;
    }
  }
}

TEST(SchedulesTest, BarrierEndsOnNoRankBeforeAllHaveCome) {
  for (const Layout& layout : kLayouts) {
    for (unsigned seed = 0; seed < kSeeds; ++seed) {
      Call call(layout, variantOf(layout, seed));
      for (std::size_t rank = 0; rank < call.ranks(); ++rank) {
        call.add(makeBarrier(call.topology(rank)));
      }
      EXPECT_TRUE(call.run().metInTheMiddle()) << layout.name << ", " << seed;
    }
  }
}

TEST(SchedulesTest, Broadcast) {
  tryAll(broadcast, Moves::kOne, false);
}
TEST(SchedulesTest, Gather) {
  tryAll(gather, Moves::kOne, false);
}
TEST(SchedulesTest, Scatter) {
  tryAll(scatter, Moves::kOne, false);
}
TEST(SchedulesTest, AllGather) {
  tryAll(allGather, Moves::kBlocks, false);
}
TEST(SchedulesTest, Reduce) {
  tryAll(reduce, Moves::kOne, true);
}
TEST(SchedulesTest, AllReduce) {
  tryAll(allReduce, Moves::kOne, true);
}
TEST(SchedulesTest, ReduceScatter) {
  tryAll(reduceScatter, Moves::kBlocks, true);
}

// Scratch is used again, also where ranks and messages are late.
TEST(SchedulesTest, SumsOfMoreThanScratchHolds) {
  unsigned seed = 0;
  for (const Layout& layout : kLayouts) {
    if (layout.size() < 4 || layout.size() > 6) {
      continue;
    }
    const uint64_t block = kVeryLong / static_cast<uint64_t>(layout.size());
    const auto next = [&] { return variantOf(layout, 1 + seed++ % 3); };
    allReduce(layout, kVeryLong, next());
    reduce(layout, kVeryLong, next());
    Variant variant = next();
    variant.uneven = true;
    reduceScatter(layout, whole(block, variant), variant);
  }
}

TEST(SchedulesTest, SumsHaveTheSameBitsWhereverTheyGo) {
  const Layout& layout = kLayouts.back();
  for (const uint64_t bytes : {uint64_t{1000}, uint64_t{100'000}}) {
    Variant variant;
    variant.reduction.type = kBFloat16;
    for (int root = 0; root < layout.size(); ++root) {
      variant.root = root;
      reduce(layout, bytes, variant);
    }
    allReduce(layout, bytes, variant);
  }
}

// The order that expectedSum() promises, by hand.
TEST(SchedulesTest, SumsAreTakenOverRanksThenOverNodes) {
  const Layout layout{"", {0, 1, 2, 0, 2, 0}};
  std::vector<Bytes> given;
  std::vector<std::vector<float>> values;
  for (int rank = 0; rank < layout.size(); ++rank) {
    given.push_back(numbers(kFloat32, 4000, rank, 0));
    values.emplace_back(1000);
    std::memcpy(values.back().data(), given.back().data(), 4000);
  }
  const Bytes bytes = expectedSum(layout, {}, given);
  std::vector<float> sums(1000);
  std::memcpy(sums.data(), bytes.data(), 4000);
  std::size_t orderMatters = 0;
  for (std::size_t i = 0; i < 1000; ++i) {
    const float node0 = (values[0][i] + values[3][i]) + values[5][i];
    const float node1 = values[1][i];
    const float node2 = values[2][i] + values[4][i];
    EXPECT_EQ(sums[i], (node0 + node1) + node2);
    float flat = 0;
    for (const std::vector<float>& value : values) {
      flat += value[i];
    }
    orderMatters += flat != sums[i] ? 1 : 0;
  }
  EXPECT_GT(orderMatters, 100U);
}

TEST(SchedulesTest, NothingIsSentForNoBytes) {
  for (const Layout& layout : kLayouts) {
    for (int rank = 0; rank < layout.size(); ++rank) {
      const Topology topology = layout.topology(rank);
      const std::vector<Block> to(layout.labels.size());
      const std::vector<ConstBlock> from(layout.labels.size());
      EXPECT_TRUE(makeBroadcast(topology, 0, nullptr, 0).steps().empty());
      EXPECT_TRUE(makeGather(topology, 0, {}, to).steps().empty());
      EXPECT_TRUE(makeScatter(topology, 0, from, {}).steps().empty());
      EXPECT_TRUE(makeAllGather(topology, {}, to).steps().empty());
      EXPECT_TRUE(
          makeReduce(topology, {}, 0, nullptr, nullptr, 0).steps().empty());
      EXPECT_TRUE(
          makeAllReduce(topology, {}, nullptr, nullptr, 0).steps().empty());
      EXPECT_TRUE(makeReduceScatter(topology, {}, from, {}).steps().empty());
      EXPECT_EQ(makeBarrier(topology).steps().empty(), layout.size() == 1);
    }
  }
}

TEST(SchedulesTest, BlocksOfAnotherSizeAreRefused) {
  const Topology topology = kLayouts[1].topology(0);
  std::byte data[8];
  const std::vector<Block> one = {{data, 8}};
  const std::vector<Block> two = {{data, 4}, {data + 4, 4}};
  EXPECT_THROW(makeAllGather(topology, {data, 8}, one), Error);
  EXPECT_THROW(makeAllGather(topology, {data, 8}, two), Error);
  EXPECT_THROW(makeGather(topology, 0, {data, 8}, two), Error);
  EXPECT_THROW(makeScatter(topology, 0, {}, two[0]), Error);
  EXPECT_THROW(makeReduceScatter(topology, {}, {}, two[0]), Error);
  EXPECT_THROW(makeAllReduce(topology, {}, data, data, 6), Error);
}

TEST(SchedulesTest, RootsThatAreNoRanksAreRefused) {
  const Topology topology = kLayouts[1].topology(0);
  for (const int root : {-1, 2}) {
    EXPECT_THROW(makeBroadcast(topology, root, nullptr, 0), InvalidArgument);
    EXPECT_THROW(makeGather(topology, root, {}, {}), InvalidArgument);
    EXPECT_THROW(makeScatter(topology, root, {}, {}), InvalidArgument);
    EXPECT_THROW(
        makeReduce(topology, {}, root, nullptr, nullptr, 0), InvalidArgument);
  }
}

void eachLayoutAndSize(
    const std::function<void(const Layout&, const Topology&, uint64_t)>& body) {
  for (const Layout& layout : kLayouts) {
    for (const uint64_t bytes :
         {uint64_t{1000}, uint64_t{16392}, uint64_t{70'000}, kLong + 1}) {
      SCOPED_TRACE(concat(layout.name, ", ", bytes, " bytes"));
      body(layout, layout.topology(0), bytes);
    }
  }
}

TEST(SchedulesTest, ABlockOfAnAllGatherCrossesOnceToEachNode) {
  eachLayoutAndSize(
      [](const Layout& layout, const Topology& t, uint64_t bytes) {
        Variant variant;
        variant.uneven = true;
        const Call call(layout, variant);
        const ScheduleWorld world = allGather(layout, bytes, variant);
        for (int rank = 0; rank < layout.size(); ++rank) {
          const uint64_t block =
              call.blockBytes(bytes, static_cast<std::size_t>(rank));
          for (int node = 0; node < t.numNodes(); ++node) {
            uint64_t crossed = 0;
            for (const int target : t.ranksOf(node)) {
              crossed += world.crossed(rank, target);
            }
            EXPECT_EQ(crossed, node == t.nodeOf(rank) ? 0 : block);
          }
        }
      });
}

TEST(SchedulesTest, ASumOfAReduceScatterLeavesEachNodeOnce) {
  eachLayoutAndSize(
      [](const Layout& layout, const Topology& t, uint64_t bytes) {
        Variant variant;
        variant.uneven = true;
        const Call call(layout, variant);
        const ScheduleWorld world = reduceScatter(layout, bytes, variant);
        for (int rank = 0; rank < layout.size(); ++rank) {
          const uint64_t block =
              call.blockBytes(bytes, static_cast<std::size_t>(rank));
          for (int node = 0; node < t.numNodes(); ++node) {
            uint64_t crossed = 0;
            for (const int source : t.ranksOf(node)) {
              crossed += world.crossed(source, rank);
            }
            EXPECT_EQ(crossed, node == t.nodeOf(rank) ? 0 : block);
          }
        }
      });
}

TEST(SchedulesTest, ABroadcastCrossesOnceToEachNode) {
  eachLayoutAndSize(
      [](const Layout& layout, const Topology& t, uint64_t bytes) {
        Variant variant;
        variant.root = layout.size() / 2;
        const ScheduleWorld world = broadcast(layout, bytes, variant);
        const int rootNode = t.nodeOf(variant.root);
        for (int node = 0; node < t.numNodes(); ++node) {
          EXPECT_EQ(crossedTo(world, t, node), node == rootNode ? 0 : bytes);
          if (bytes > kSmallBroadcast) {
            EXPECT_LE(crossedFrom(world, t, node), bytes);
          }
        }
      });
}

TEST(SchedulesTest, ASumLeavesEachNodeOnce) {
  eachLayoutAndSize(
      [](const Layout& layout, const Topology& t, uint64_t bytes) {
        Variant variant;
        variant.root = layout.size() - 1;
        const ScheduleWorld world = reduce(layout, bytes, variant);
        const int rootNode = t.nodeOf(variant.root);
        for (int node = 0; node < t.numNodes(); ++node) {
          const uint64_t sent = crossedFrom(world, t, node);
          if (node == rootNode) {
            EXPECT_LE(sent, bytes);
          } else {
            EXPECT_EQ(sent, bytes);
          }
        }
      });
}

TEST(SchedulesTest, ALargeAllReduceCrossesAsASumAndBack) {
  eachLayoutAndSize(
      [](const Layout& layout, const Topology& t, uint64_t bytes) {
        if (bytes <= kSmallSum) {
          return;
        }
        const ScheduleWorld world = allReduce(layout, bytes, {});
        const auto nodes = static_cast<uint64_t>(t.numNodes());
        const uint64_t bound = 2 * (nodes - 1) * (bytes / nodes + 64);
        for (int node = 0; node < t.numNodes(); ++node) {
          EXPECT_LE(crossedFrom(world, t, node), bound);
          EXPECT_LE(crossedTo(world, t, node), bound);
        }
      });
}

TEST(SchedulesTest, CutsAreWholeUnitsInOrder) {
  for (const uint64_t bytes : {0, 1, 63, 64, 65, 1000, 100'000}) {
    for (const uint64_t parts : {1, 2, 3, 8, 100}) {
      uint64_t end = 0;
      for (const Range& range : cutEvenly(bytes, parts)) {
        EXPECT_EQ(range.begin, end);
        EXPECT_TRUE(range.bytes == 0 || range.begin % 64 == 0);
        EXPECT_LE(range.bytes, bytes / parts + 64);
        end += range.bytes;
      }
      EXPECT_EQ(end, bytes);
    }
  }
  EXPECT_TRUE(cutIntoPieces(0).empty());
  EXPECT_EQ(cutIntoPieces(kPieceBytes).size(), 1U);
  EXPECT_EQ(cutIntoPieces(kPieceBytes + 1).size(), 2U);
  EXPECT_EQ(cutIntoPieces(uint64_t{1} << 40).size(), kMaxPieces);
}

}  // namespace
}  // namespace automoe::testing
