// SPDX-License-Identifier: Apache-2.0
// What a plan refuses to be asked.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "process_group/common/error.hpp"
#include "process_group/exchange/route.hpp"
#include "routes.hpp"

namespace automoe {
namespace {

using routes::Ids;
using routes::planAll;
using routes::PlanCase;
using routes::textOf;

constexpr int32_t kMost = std::numeric_limits<int32_t>::max();

std::string refusalOf(const PlanArguments& arguments) {
  const Topology topology = Topology::fromNodeLabels({0, 0, 1}, 0);
  return textOf<InvalidArgument>([&] { RouteBuilder(topology, arguments); });
}

TEST(PlanArgumentsTest, ArgumentsOutOfRange) {
  const Ids ids{0, 1, 2, 3};
  const PlanArguments good{ids, 2, 2, 4};
  EXPECT_EQ(refusalOf(good), "nothing was thrown");
  const auto refusal = [&](auto member, auto value) {
    PlanArguments bad = good;
    bad.*member = value;
    return refusalOf(bad);
  };
  const std::string most = " to 2147483647";
  EXPECT_EQ(
      refusal(&PlanArguments::numExperts, 0),
      "plan: num_experts is 0, expected 1" + most);
  EXPECT_EQ(
      refusal(&PlanArguments::numExperts, int64_t{1} << 31),
      "plan: num_experts is 2147483648, expected 1" + most);
  EXPECT_EQ(
      refusal(&PlanArguments::topK, 0),
      "plan: the number of experts per token of topk_ids is 0, expected 1" +
          most);
  EXPECT_EQ(
      refusal(&PlanArguments::numTokens, -1),
      "plan: the number of tokens of topk_ids is -1, expected 0" + most);
  EXPECT_EQ(
      refusal(&PlanArguments::align, 0), "plan: align is 0, expected 1" + most);
  EXPECT_EQ(
      refusal(&PlanArguments::maxReceiveTokens, -2),
      "plan: max_recv_tokens is -2, expected 0" + most);
  EXPECT_EQ(
      refusal(&PlanArguments::numTokens, 3),
      "plan: topk_ids has 4 items, expected 6 for 3 tokens of 2");
  EXPECT_EQ(
      refusal(&PlanArguments::numExperts, 3),
      "plan: topk_ids[1][1] is 3, expected -1 (no expert) or 0 to 2");
  using Map = std::vector<int32_t>;
  EXPECT_EQ(
      refusal(&PlanArguments::reductionMap, Map{0, 1}),
      "plan: reduction_map has 2 labels, expected one for each of 3 ranks");
  EXPECT_EQ(
      refusal(&PlanArguments::reductionMap, Map{0, 1, -4}),
      "plan: reduction_map[2] is -4, expected a label of at least 0");
}

TEST(PlanArgumentsTest, IdBelowMinusOne) {
  const Ids ids{0, -1, -2};
  EXPECT_EQ(
      refusalOf({ids, 3, 1, 4}),
      "plan: topk_ids[2][0] is -2, expected -1 (no expert) or 0 to 3");
}

TEST(PlanArgumentsTest, SizesBeyond32Bits) {
  EXPECT_EQ(
      refusalOf({{}, 1 << 29, 8, 4}),
      "plan: topk_ids of shape (536870912, 8) has 4294967296 items, expected "
      "at most 2147483647");
  EXPECT_EQ(
      refusalOf({{}, kMost, kMost, 4}),
      "plan: topk_ids of shape (2147483647, 2147483647) has "
      "4611686014132420609 items, expected at most 2147483647");
}

// Two experts with a row each: padding alone goes beyond.
TEST(PlanArgumentsTest, ReceiveRowsBeyond32Bits) {
  PlanCase it;
  it.labels = {0};
  it.numExperts = 2;
  it.align = kMost;
  it.ids = {{0, 1}};
  EXPECT_EQ(
      textOf<InvalidArgument>([&] { planAll(it); }),
      "plan: rank 0 would receive 4294967294 rows (2 experts, align "
      "2147483647), expected at most 2147483647; max_recv_tokens bounds them");
  it.maxReceiveTokens = 5;
  const auto result = planAll(it)[0];
  EXPECT_EQ(result.offsets, Ids({5, 5}));
  EXPECT_EQ(result.receiveIndex, Ids({0, -1, -1, -1, -1}));
  EXPECT_EQ(Route(result.route).numDropped(), 1);
}

}  // namespace
}  // namespace automoe
