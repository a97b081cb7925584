// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/row_moves.hpp"

#include <gtest/gtest.h>

#include "process_group/exchange/combine_units.hpp"

namespace automoe::testing {
namespace {

// One rank, whose three tokens each have two of four experts.
PlanResult makePlanOfOneRank() {
  const std::vector<int32_t> ids = {0, 1, 2, 3, 1, 3};
  RouteBuilder builder(
      Topology::fromNodeLabels({0}, 0),
      PlanArguments{
          .topkIds = ids, .numTokens = 3, .topK = 2, .numExperts = 4});
  const std::string list = builder.listFor(0);
  builder.add(0, std::as_bytes(std::span(list)));
  return builder.finish();
}

TEST(RowMovesTest, SizesOfMoreThanTwoToThe32) {
  constexpr uint64_t kRowBytes = uint64_t{3} << 32;
  const PlanResult plan = makePlanOfOneRank();
  const Route route(plan.route);
  DispatchArguments dispatch;
  dispatch.fields = {{nullptr, nullptr, kRowBytes}};
  dispatch.weightBytes = 4;
  EXPECT_EQ(packedBytes(route, dispatch, 0, 3), 3 * kRowBytes + 6 * 4);
  EXPECT_EQ(rowsThatFit(route, dispatch, 0, 3, 2 * kRowBytes + 16), 2U);
  EXPECT_EQ(rowsThatFit(route, dispatch, 0, 3, 100), 1U);

  CombineArguments combine;
  combine.dtype = kernels::DType::kFloat32;
  combine.elements = kRowBytes / sizeof(float);
  combine.withScalars = true;
  EXPECT_EQ(combineChunkBytes(route, combine, 3, 6), 3 * kRowBytes + 6 * 4);
  const Topology topology = Topology::fromNodeLabels({0}, 0);
  const auto units = combineUnits(route, combine, topology, 0);
  ASSERT_EQ(units.size(), 3U);  // a row each
  EXPECT_EQ(RowStream(route, combine, units).bytes(), 6 * (kRowBytes + 4));
}

TEST(RowMovesTest, LayoutsDiffer) {
  DispatchArguments one;
  one.fields = {{nullptr, nullptr, 40, 6}};
  DispatchArguments two;
  two.fields = {{nullptr, nullptr, 20, 6}, {nullptr, nullptr, 20, 6}};
  DispatchArguments other = two;
  other.fields[1].dtype = 7;
  EXPECT_NE(layoutOf(one), layoutOf(two));
  EXPECT_NE(layoutOf(two), layoutOf(other));
}

}  // namespace
}  // namespace automoe::testing
