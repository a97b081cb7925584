// SPDX-License-Identifier: Apache-2.0
// Dispatch and combine on devices, against the CPU, bit for bit. The devices
// are doubles that run work in any order that streams, events and flags allow.
#include "process_group/exchange/device_exchange.hpp"

#include <gtest/gtest.h>

#include <array>

#include "device_ranks.hpp"
#include "process_group/common/error.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr std::array kDTypes = {
    kernels::DType::kBFloat16,
    kernels::DType::kFloat32,
    kernels::DType::kFloat16,
    kernels::DType::kFloat64};

/// All cases of a rank are enqueued before the host looks at any result; those
/// in few blocks are fenced too.
void thereAndBack(
    DeviceRanks& ranks,
    const std::vector<std::pair<Routing, DeviceCase>>& cases,
    int maxBlocks = 0) {
  ranks.run([&](int rank) {
    std::vector<std::unique_ptr<TwinCall>> calls;
    for (const auto& [routing, it] : cases) {
      const PlanResult plan =
          makePlan(ranks.engine(rank), ranks.group(rank), routing);
      calls.push_back(
          std::make_unique<TwinCall>(ranks.exchange(rank), plan, it));
      calls.back()->runOnCpu(ranks.engine(rank), ranks.group(rank));
    }
    enqueueAndCompare(ranks, rank, calls, maxBlocks, maxBlocks > 0);
  });
}

class DeviceExchangeTest : public ::testing::TestWithParam<Shape> {};

TEST_P(DeviceExchangeTest, ThereAndBack) {
  DeviceRanks ranks(GetParam(), 1);
  const int size = ranks.size();
  std::vector<std::pair<Routing, DeviceCase>> cases;
  unsigned seed = 1;
  for (const auto dtype : kDTypes) {
    for (const int64_t topK : {1, 4}) {
      cases.emplace_back(
          randomRouting(size, 2 * size + 1, topK, 6, seed),
          DeviceCase{
              .dtype = dtype,
              .elements = seed % 3 == 0 ? 24U : 7U,
              .weighted = seed % 2 == 0,
              .withScalars = seed % 3 != 1,
              .seed = seed});
      seed += 1;
    }
  }
  thereAndBack(ranks, cases);
  ranks.expectNoErrors();
}

TEST_P(DeviceExchangeTest, PackedPaddedFencedAndInFewBlocks) {
  DeviceRanks ranks(GetParam(), 2);
  const int size = ranks.size();
  std::vector<std::pair<Routing, DeviceCase>> cases;
  for (unsigned seed = 1; seed < 5; ++seed) {
    Routing routing = randomRouting(size, 2 * size, 3, 8, seed);
    routing.align = seed % 2 == 0 ? 4 : 1;
    routing.maxReceiveTokens = seed == 3 ? 9 : -1;
    cases.emplace_back(
        routing, DeviceCase{.packed = seed % 2 == 1, .seed = seed});
  }
  thereAndBack(ranks, cases, 2);
  ranks.expectNoErrors();
}

TEST_P(DeviceExchangeTest, Nothing) {
  DeviceRanks ranks(GetParam(), 3);
  Routing empty = randomRouting(ranks.size(), 4, 2, 0, 6);
  Routing unrouted = empty;
  for (auto& ids : unrouted.ids) {
    ids.assign(6, -1);
  }
  thereAndBack(
      ranks,
      {{empty, {}}, {unrouted, {}}, {unrouted, {.elements = 0}}, {empty, {}}});
  ranks.expectNoErrors();
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    DeviceExchangeTest,
    ::testing::Values(
        Shape{{1}},
        Shape{{3}},
        Shape{{1, 1}},
        Shape{{2, 2}},
        Shape{{3, 1, 2}},
        Shape{{2, 2, 2, 2}}));

TEST(DeviceExchange, FourNodesInManyOrders) {
  for (unsigned seed = 10; seed < 22; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    DeviceRanks ranks(Shape{{2, 2, 2, 2}}, seed);
    std::vector<std::pair<Routing, DeviceCase>> cases;
    // Small, large, small, none: arenas grow while calls are under way.
    for (const int64_t tokens : {2, 12, 3, 5, 0}) {
      const auto at = static_cast<unsigned>(cases.size());
      Routing routing =
          randomRouting(8, 16, 3, tokens, seed + static_cast<unsigned>(tokens));
      routing.align = at == 3 ? 4 : 1;
      routing.maxReceiveTokens = at == 2 ? 5 : -1;
      cases.emplace_back(
          routing,
          DeviceCase{
              .dtype = kDTypes.at((seed + at) % kDTypes.size()),
              .elements = at == 0 ? 7U : 16U,
              .weighted = (seed + at) % 3 != 0,
              .withScalars = at != 2,
              .packed = (seed + at) % 2 == 1,
              .seed = seed});
    }
    thereAndBack(ranks, cases, seed % 3 == 0 ? 2 : 0);
    ranks.expectNoErrors();
  }
}

TEST(DeviceExchange, AGraphKeepsTheListsThatItReads) {
  DeviceRanks ranks(Shape{{2, 1}}, 6);
  const Routing routing = randomRouting(3, 6, 2, 5, 1);
  std::vector<std::weak_ptr<const DeviceRoute>> eager(3);
  std::vector<std::weak_ptr<const DeviceRoute>> captured(3);
  ranks.run([&](int rank) {
    const PlanResult plan =
        makePlan(ranks.engine(rank), ranks.group(rank), routing);
    for (const bool capturing : {false, true}) {
      TwinCall call(ranks.exchange(rank), plan, {});
      call.runOnCpu(ranks.engine(rank), ranks.group(rank));
      ranks.world().setCapturing(rank, capturing);
      call.enqueue(ranks.exchange(rank));
      ranks.world().setCapturing(rank, false);
      call.expectSame();
      for (const auto& made : call.calls) {
        finish(ranks.engine(rank), *made.operation);
      }
      (capturing ? captured : eager)[static_cast<size_t>(rank)] =
          call.watchLists();
    }
    // The next call forgets those that have ended.
    TwinCall next(ranks.exchange(rank), plan, {});
    next.enqueue(ranks.exchange(rank));
    for (const auto& made : next.calls) {
      finish(ranks.engine(rank), *made.operation);
    }
  });
  for (size_t rank = 0; rank < 3; ++rank) {
    EXPECT_TRUE(eventually([&] { return eager[rank].expired(); }));
    EXPECT_FALSE(captured[rank].expired());
  }
  ranks.expectNoErrors();
  for (size_t rank = 0; rank < 3; ++rank) {
    EXPECT_TRUE(captured[rank].expired());
  }
}

TEST(DeviceExchange, PinnedSumsAreRefused) {
  DeviceRanks ranks(Shape{{2, 2}}, 4);
  Routing routing = randomRouting(4, 8, 2, 4, 1);
  routing.reductionMap = {0, 1, 2, 3};
  ranks.run([&](int rank) {
    const PlanResult plan =
        makePlan(ranks.engine(rank), ranks.group(rank), routing);
    EXPECT_THROW(
        ranks.exchange(rank).upload(Route(plan.route)), InvalidArgument);
  });
}

}  // namespace
}  // namespace automoe::testing
