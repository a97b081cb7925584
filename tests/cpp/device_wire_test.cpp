// SPDX-License-Identifier: Apache-2.0
// Rows between nodes as 8-bit floats, against the CPU's rows and rounding.
#include "process_group/exchange/device_wire.hpp"

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "device_dispatches.hpp"
#include "process_group/common/error.hpp"

namespace automoe::testing {
namespace {

using kernels::DType;

DispatchArguments::Field fieldOf(std::optional<DType> number, uint64_t bytes) {
  return {nullptr, nullptr, bytes, 0, number};
}

TEST(DeviceWire, FormatsAreForNumbersThatShrink) {
  const auto fp8 = [](std::optional<DType> number, uint64_t bytes) {
    return fp8FormatOf(fieldOf(number, bytes), DeviceWire::kFp8);
  };
  ASSERT_TRUE(fp8(DType::kBFloat16, 400).has_value());
  EXPECT_EQ(fp8(DType::kBFloat16, 400)->valueBytes(), 200U);
  EXPECT_EQ(fp8(DType::kBFloat16, 400)->scaleBytes(), 8U);
  EXPECT_EQ(fp8(DType::kFloat32, 512)->scaleBytes(), 4U);
  EXPECT_TRUE(fp8(DType::kFloat16, 10).has_value());  // 9 bytes
  EXPECT_FALSE(fp8(DType::kFloat16, 8).has_value());  // 8 bytes
  EXPECT_FALSE(fp8(DType::kFloat64, 512).has_value());
  EXPECT_FALSE(fp8(std::nullopt, 512).has_value());
  EXPECT_FALSE(fp8(DType::kBFloat16, 401).has_value());
  EXPECT_FALSE(fp8(DType::kBFloat16, 0).has_value());
  EXPECT_FALSE(fp8FormatOf(fieldOf(DType::kBFloat16, 400), DeviceWire::kAsIs)
                   .has_value());
}

/// All dispatches of a rank are enqueued before the host looks at one; then
/// what was sent is compared.
void dispatchAll(
    DeviceRanks& ranks,
    const std::vector<std::pair<Routing, DispatchCase>>& cases) {
  ranks.run([&](int rank) {
    std::vector<std::unique_ptr<DispatchTwin>> twins;
    uint64_t bytes = 0;
    for (const auto& [routing, it] : cases) {
      twins.push_back(std::make_unique<DispatchTwin>(ranks, rank, routing, it));
      bytes += twins.back()->bytesToOtherNodes();
    }
    const uint64_t before = ranks.world().statistics(rank).sentBytes;
    for (const auto& twin : twins) {
      twin->enqueue();
    }
    for (const auto& twin : twins) {
      twin->finish();
    }
    EXPECT_EQ(ranks.world().statistics(rank).sentBytes - before, bytes)
        << "rank " << rank;
  });
}

class DeviceWireTest : public ::testing::TestWithParam<Shape> {};

TEST_P(DeviceWireTest, RowsOfEveryType) {
  for (const unsigned seed : {1U, 2U, 3U}) {
    DeviceRanks ranks(GetParam(), seed);
    const int size = ranks.size();
    std::vector<std::pair<Routing, DispatchCase>> cases;
    for (const size_t elements : {128U, 200U, 300U, 7U, 1U}) {
      const auto one = static_cast<unsigned>(elements) + seed;
      cases.emplace_back(
          randomRouting(size, 2 * size, 3, 5, one),
          DispatchCase{
              .fields =
                  {{DType::kBFloat16, elements},
                   {DType::kFloat64, 3},
                   {DType::kFloat32, elements},
                   {std::nullopt, 40},
                   {DType::kFloat16, elements}},
              .weighted = elements != 200,
              .packed = one % 2 == 0,
              .wire = DeviceWire::kFp8,
              .maxBlocks = elements == 300 ? 2 : 0,
              .seed = one});
    }
    dispatchAll(ranks, cases);
    ranks.expectNoErrors();
  }
}

TEST_P(DeviceWireTest, OneAfterTheOtherInEitherForm) {
  DeviceRanks ranks(GetParam(), 4);
  const int size = ranks.size();
  std::vector<std::pair<Routing, DispatchCase>> cases;
  // Scratch memory grows and is used again.
  for (unsigned i = 0; i < 6; ++i) {
    Routing routing = randomRouting(size, 2 * size, 2, i % 3 * 6 + 1, i);
    routing.align = i == 4 ? 4 : 1;
    cases.emplace_back(
        routing,
        DispatchCase{
            .fields = {{DType::kBFloat16, 136}},
            .packed = i == 3,
            .wire = i % 2 == 0 ? DeviceWire::kFp8 : DeviceWire::kAsIs,
            .seed = i});
  }
  dispatchAll(ranks, cases);
  ranks.expectNoErrors();
}

TEST_P(DeviceWireTest, Nothing) {
  DeviceRanks ranks(GetParam(), 5);
  const Routing empty = randomRouting(ranks.size(), 4, 2, 0, 6);
  Routing unrouted = empty;
  for (auto& ids : unrouted.ids) {
    ids.assign(6, -1);
  }
  const DispatchCase wide = {
      .fields = {{DType::kBFloat16, 128}}, .wire = DeviceWire::kFp8};
  const DispatchCase thin = {
      .fields = {{DType::kBFloat16, 0}}, .wire = DeviceWire::kFp8};
  dispatchAll(ranks, {{empty, wide}, {unrouted, wide}, {unrouted, thin}});
  ranks.expectNoErrors();
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    DeviceWireTest,
    ::testing::Values(
        Shape{{4}}, Shape{{2, 2}}, Shape{{2, 2, 2, 2}}, Shape{{1, 2}}));

TEST(DeviceWire, SumsGoAsTheyAre) {
  DeviceRanks ranks(Shape{{2, 1}}, 6);
  const Routing routing = randomRouting(3, 6, 2, 5, 1);
  ranks.run([&](int rank) {
    const PlanResult plan =
        makePlan(ranks.engine(rank), ranks.group(rank), routing);
    // No number is said to be in its rows, so its combine tells.
    TwinCall call(ranks.exchange(rank), plan, {.elements = 200});
    call.runOnCpu(ranks.engine(rank), ranks.group(rank));
    call.wire = DeviceWire::kFp8;
    call.enqueue(ranks.exchange(rank));
    call.expectSame();
    for (const auto& made : call.calls) {
      finish(ranks.engine(rank), *made.operation);
    }
  });
  ranks.expectNoErrors();
}

// Beyond what exact rows take, only those that came are put back; those that go
// are gathered as they are quantized.
TEST(DeviceWire, TakesOneKernelMore) {
  DeviceRanks ranks(Shape{{1, 1}}, 8);
  Routing routing = randomRouting(2, 4, 2, 5, 1);
  // Every token goes to both nodes.
  routing.ids = {{0, 3, 2, 1}, {3, 1}};
  ranks.run([&](int rank) {
    uint64_t calls[2] = {};
    // Of the last two: in the first ones memory grows.
    for (int call = 0; call < 6; ++call) {
      const DeviceWire wire =
          call % 2 == 0 ? DeviceWire::kAsIs : DeviceWire::kFp8;
      DispatchTwin twin(
          ranks,
          rank,
          routing,
          {.fields = {{DType::kBFloat16, 128}}, .wire = wire});
      const uint64_t before = ranks.world().statistics(rank).enqueued;
      twin.enqueue();
      calls[call % 2] = ranks.world().statistics(rank).enqueued - before;
      twin.finish();
    }
    EXPECT_EQ(calls[1], calls[0] + 1) << "rank " << rank;
  });
  ranks.expectNoErrors();
}

TEST(DeviceWire, ADisagreementIsNamed) {
  DeviceRanks ranks(Shape{{1, 2}}, 7);
  const Routing routing = randomRouting(3, 6, 2, 5, 1);
  std::vector<std::unique_ptr<DispatchTwin>> twins(3);
  // Before any rank goes on: it would fail the dispatch on the CPU of others.
  ranks.run([&](int rank) {
    twins[static_cast<size_t>(rank)] = std::make_unique<DispatchTwin>(
        ranks,
        rank,
        routing,
        DispatchCase{.wire = rank == 2 ? DeviceWire::kFp8 : DeviceWire::kAsIs});
  });
  ranks.run([&](int rank) {
    DispatchTwin& twin = *twins[static_cast<size_t>(rank)];
    try {
      twin.enqueue();
      twin.finish();
      ADD_FAILURE() << "no error on rank " << rank;
    } catch (const Error& error) {
      const std::string text = error.what();
      EXPECT_NE(
          text.find("sends rows between nodes as they are, rank"),
          std::string::npos)
          << text;
      EXPECT_NE(
          text.find("as 8-bit floats; they must agree"), std::string::npos)
          << text;
    }
  });
}

}  // namespace
}  // namespace automoe::testing
