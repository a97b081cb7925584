// SPDX-License-Identifier: Apache-2.0
// Plans that devices make, against those of the host, and what travels by them.
#include "process_group/exchange/device_plan.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "device_plan_calls.hpp"
#include "process_group/common/error.hpp"

namespace automoe::testing {
namespace {

/// The words of a route of the device's, against the host's.
void expectSameWords(
    const Routing& routing,
    std::vector<int32_t> got,
    const std::vector<int32_t>& expected) {
  if (routing.maxReceiveTokens >= 0) {
    // The host does not know the ids, so its fingerprint is another one.
    RouteHeader header = readRouteHeader(got);
    header.fingerprint = readRouteHeader(expected).fingerprint;
    writeRouteHeader(header, got);
  }
  EXPECT_EQ(got, expected);
}

/// Plans on the CPU and on the device, and a dispatch and combine by each.
void planAndExchange(
    DeviceRanks& ranks,
    const std::vector<std::pair<Routing, DeviceCase>>& cases,
    bool fenced = false) {
  ranks.run([&](int rank) {
    std::vector<std::unique_ptr<PlanCall>> plans;
    std::vector<std::unique_ptr<TwinCall>> twins;
    for (const auto& [routing, it] : cases) {
      const PlanResult plan =
          makePlan(ranks.engine(rank), ranks.group(rank), routing);
      plans.push_back(
          std::make_unique<PlanCall>(ranks.exchange(rank), routing, rank));
      const auto before = ranks.world().statistics(rank);
      const auto planned = plans.back()->make(ranks.exchange(rank), fenced);
      const auto after = ranks.world().statistics(rank);
      EXPECT_EQ(after.synchronized, before.synchronized);
      EXPECT_EQ(after.freed, before.freed);
      twins.push_back(std::make_unique<TwinCall>(
          ranks.exchange(rank), plan, it, planned.route));
      twins.back()->runOnCpu(ranks.engine(rank), ranks.group(rank));
      twins.back()->enqueue(ranks.exchange(rank), 0, fenced);
      if (routing.numExperts % 2 == 0) {
        const auto lists = ranks.exchange(rank).readBack(*planned.route);
        expectSameWords(routing, lists.words, plan.route);
        EXPECT_EQ(lists.offsets, plan.offsets);
        Route(lists.words);
      }
      plans.back()->expectSame(plan);
    }
    for (const auto& twin : twins) {
      twin->expectSame();
      for (const auto& made : twin->calls) {
        finish(ranks.engine(rank), *made.operation);
      }
    }
  });
}

class DevicePlanTest : public ::testing::TestWithParam<Shape> {};

TEST_P(DevicePlanTest, IsThatOfTheHost) {
  DeviceRanks ranks(GetParam(), 1);
  const int size = ranks.size();
  std::vector<std::pair<Routing, DeviceCase>> cases;
  for (unsigned seed = 1; seed < 5; ++seed) {
    Routing routing =
        randomRouting(size, 2 * size + seed % 2, 1 + seed, 7, seed);
    routing.align = seed % 2 == 0 ? 4 : 1;
    cases.emplace_back(
        routing, DeviceCase{.packed = seed % 2 == 1, .seed = seed});
  }
  planAndExchange(ranks, cases);
  ranks.expectNoErrors();
}

TEST_P(DevicePlanTest, WithABoundTheHostDoesNotLook) {
  DeviceRanks ranks(GetParam(), 2);
  const int size = ranks.size();
  std::vector<std::pair<Routing, DeviceCase>> cases;
  for (unsigned seed = 1; seed < 5; ++seed) {
    Routing routing =
        randomRouting(size, 2 * size + seed % 2, seed, 7, 10 + seed);
    routing.align = seed % 2 == 0 ? 4 : 1;
    routing.maxReceiveTokens = seed == 1 ? 0 : seed == 2 ? 9 : 200;
    cases.emplace_back(routing, DeviceCase{.seed = seed});
  }
  planAndExchange(ranks, cases, true);
  ranks.expectNoErrors();
}

TEST_P(DevicePlanTest, OfNothing) {
  DeviceRanks ranks(GetParam(), 3);
  Routing empty = randomRouting(ranks.size(), 4, 2, 0, 6);
  Routing unrouted = empty;
  for (auto& ids : unrouted.ids) {
    ids.assign(6, -1);
  }
  Routing bounded = unrouted;
  bounded.maxReceiveTokens = 3;
  planAndExchange(ranks, {{empty, {}}, {unrouted, {}}, {bounded, {}}});
  ranks.expectNoErrors();
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    DevicePlanTest,
    ::testing::Values(
        Shape{{1}},
        Shape{{4}},
        Shape{{2, 2}},
        Shape{{2, 2, 2, 2}},
        Shape{{3, 1, 2}}));

TEST(DevicePlanTest, AGraphPlansAnewAtEachReplay) {
  for (const auto& shape : {Shape{{3}}, Shape{{2, 2}}}) {
    DeviceRanks ranks(shape, 8);
    const int size = ranks.size();
    std::vector<Routing> routings;
    for (unsigned seed = 1; seed < 6; ++seed) {
      Routing routing = randomRouting(size, 2 * size + 1, 3, 5, 1);
      std::mt19937 random(seed);
      for (auto& ids : routing.ids) {
        std::ranges::shuffle(ids, random);
      }
      routing.maxReceiveTokens = 17;
      routings.push_back(std::move(routing));
    }
    ranks.run([&](int rank) {
      DeviceExchange& exchange = ranks.exchange(rank);
      PlanCall plan(exchange, routings[0], rank);
      plan.make(exchange);
      plan.expectSame(
          makePlan(ranks.engine(rank), ranks.group(rank), routings[0]));
      ranks.world().beginCapture(rank, plan.user());
      const auto planned = plan.make(exchange);
      const auto graph = ranks.world().endCapture(rank, plan.user());
      for (const Routing& routing : routings) {
        plan.setIds(routing.ids[static_cast<size_t>(rank)]);
        ranks.world().launch(graph, plan.user());
        const PlanResult expected =
            makePlan(ranks.engine(rank), ranks.group(rank), routing);
        plan.expectSame(expected);
      }
      finish(ranks.engine(rank), *planned.call.operation);
    });
    ranks.expectNoErrors();
  }
}

// What the host reads back is what the route has, without the lists that only
// kernels go by and what blocks have beyond.
TEST(DevicePlanTest, OnlyWhatARouteHasIsReadBack) {
  DeviceRanks ranks(Shape{{2, 2}}, 9);
  for (const int64_t bound : {-1, 50}) {
    Routing routing = randomRouting(4, 8, 3, 7, 9);
    routing.maxReceiveTokens = bound;
    ranks.run([&](int rank) {
      DeviceExchange& exchange = ranks.exchange(rank);
      PlanCall plan(exchange, routing, rank);
      const auto planned = plan.make(exchange);
      exchange.device().synchronize(plan.user());
      const uint64_t before = ranks.world().statistics(rank).copiedBytes;
      const auto lists = exchange.readBack(*planned.route);
      const uint64_t copied =
          ranks.world().statistics(rank).copiedBytes - before;
      const RouteHeader header = readRouteHeader(lists.words);
      const auto sections = static_cast<uint64_t>(
          2 * header.numSendRows + 1 + header.numSlots + header.numLandRows +
          1 + header.numEntries);
      const uint64_t counts = planned.route->planned()->at.words;
      EXPECT_EQ(copied, (sections + counts) * sizeof(int32_t));
    });
  }
  ranks.expectNoErrors();
}

// Page-locked memory is made for lists when the host asks for them.
TEST(DevicePlanTest, ListsHaveNoTwinUntilTheyAreReadBack) {
  const Routing small = randomRouting(4, 8, 3, 7, 10);
  Routing large = small;
  for (auto& ids : large.ids) {
    // More than 64 KiB, the smallest block.
    ids.assign(3 * 4000, 5);
  }
  for (const int64_t bound : {-1, 60000}) {
    DeviceRanks ranks(Shape{{2, 2}}, 10);
    large.maxReceiveTokens = bound;
    ranks.run([&](int rank) {
      DeviceExchange& exchange = ranks.exchange(rank);
      {
        PlanCall first(exchange, small, rank);
        const auto planned = first.make(exchange);
        exchange.device().synchronize(first.user());
        finish(ranks.engine(rank), *planned.call.operation);
      }
      PlanCall plan(exchange, large, rank);
      ranks.world().failCalls(rank, "allocateHost", 1);
      const auto planned = plan.make(exchange);
      EXPECT_THROW(exchange.readBack(*planned.route), DeviceFullError);
      const auto lists = exchange.readBack(*planned.route);
      ranks.world().failCalls(rank, "allocateHost", 0);
      const PlanResult expected =
          makePlan(ranks.engine(rank), ranks.group(rank), large);
      expectSameWords(large, lists.words, expected.route);
      finish(ranks.engine(rank), *planned.call.operation);
    });
    ranks.expectNoErrors();
  }
}

void expectRefused(DeviceExchange& exchange, PlanCall& plan, const char* text) {
  try {
    plan.make(exchange);
    ADD_FAILURE() << "it was taken";
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(error.what(), text);
  }
}

TEST(DevicePlanTest, AGraphNeedsABound) {
  DeviceRanks ranks(Shape{{2, 2}}, 6);
  const Routing routing = randomRouting(4, 5, 2, 4, 3);
  ranks.run([&](int rank) {
    DeviceExchange& exchange = ranks.exchange(rank);
    PlanCall plan(exchange, routing, rank);
    ranks.world().beginCapture(rank, plan.user());
    expectRefused(
        exchange,
        plan,
        "plan: max_recv_tokens is None while a graph is captured, expected a "
        "number of rows: without one the host waits for the GPU, and a graph "
        "has fixed sizes");
    try {
      ranks.world().endCapture(rank, plan.user());
    } catch (const DeviceError&) {
      // The stream of the exchange has not been joined again.
    }
    // The group goes on.
    PlanCall again(exchange, routing, rank);
    again.make(exchange);
    again.expectSame(makePlan(ranks.engine(rank), ranks.group(rank), routing));
  });
  ranks.expectNoErrors();
}

TEST(DevicePlanTest, AllRanksSayWhoseIdsAreNoExperts) {
  DeviceRanks ranks(Shape{{2, 2}}, 4);
  Routing routing = randomRouting(4, 5, 2, 4, 3);
  routing.ids[2].assign({0, 5, -2, 1});
  ranks.run([&](int rank) {
    PlanCall plan(ranks.exchange(rank), routing, rank);
    expectRefused(
        ranks.exchange(rank),
        plan,
        "plan: rank 2 has 2 topk_ids that are not in [-1, 5), expected "
        "experts, of which there are num_experts, or -1");
    // The group goes on.
    Routing good = routing;
    good.ids[2].assign({0, 4, -1, 1});
    PlanCall again(ranks.exchange(rank), good, rank);
    again.make(ranks.exchange(rank));
    again.expectSame(makePlan(ranks.engine(rank), ranks.group(rank), good));
  });
  ranks.expectNoErrors();
}

TEST(DevicePlanTest, AllRanksSayWhatDiffers) {
  DeviceRanks ranks(Shape{{1, 1}}, 5);
  const Routing routing = randomRouting(2, 4, 2, 4, 3);
  ranks.run([&](int rank) {
    Routing own = routing;
    own.align = rank == 1 ? 8 : 1;
    PlanCall plan(ranks.exchange(rank), own, rank);
    expectRefused(
        ranks.exchange(rank),
        plan,
        "plan: rank 0 has align 1, rank 1 has 8; all ranks of a plan on "
        "devices must pass the same");
  });
  ranks.expectNoErrors();
}

}  // namespace
}  // namespace automoe::testing
