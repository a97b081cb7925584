// SPDX-License-Identifier: Apache-2.0
// Parts of a plan: together they are the whole, on both sides of every list.
#include <gtest/gtest.h>

#include <set>
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

Ids toIds(std::span<const int32_t> words) {
  return {words.begin(), words.end()};
}

/// The local expert of a receive row.
int32_t expertOf(const PlanResult& plan, int32_t row) {
  int32_t expert = 0;
  while (plan.offsets[static_cast<size_t>(expert)] <= row) {
    expert += 1;
  }
  return expert;
}

/// A land row as its experts and mates.
Ids landRow(const PlanResult& plan, const Route& route, size_t row) {
  Ids targets;
  for (const int32_t entry : route.entries(row)) {
    targets.push_back(entry >= 0 ? expertOf(plan, entry) : entry);
  }
  return targets;
}

using Rows = std::vector<Ids>;

/// A send row as its token and slots.
void appendSends(const Route& route, int node, Rows& rows) {
  for (size_t i = route.sendBegin(node); i < route.sendBegin(node + 1); ++i) {
    Ids row = toIds(route.sendSlots(i));
    row.push_back(route.sendToken(i));
    rows.push_back(row);
  }
}

void appendLands(
    const PlanResult& plan, const Route& route, int source, Rows& rows) {
  for (size_t i = route.landBegin(source); i < route.landBegin(source + 1);
       ++i) {
    rows.push_back(landRow(plan, route, i));
  }
}

/// All parts of one rank.
std::vector<PlanResult> cutAll(const PlanResult& whole, int numParts) {
  std::vector<PlanResult> parts;
  for (int part = 0; part < numParts; ++part) {
    parts.push_back(
        partOfRoute(Route(whole.route), whole.offsets, part, numParts));
  }
  return parts;
}

void expectReceiveRows(const PlanResult& part) {
  const Route route(part.route);
  ASSERT_EQ(std::ssize(part.receiveIndex), route.numReceiveRows());
  ASSERT_EQ(route.numDropped(), 0);
  std::vector<int32_t> entries;
  for (size_t row = 0; row < route.numLandRows(); ++row) {
    const auto of = route.entries(row);
    entries.insert(entries.end(), of.begin(), of.end());
  }
  int64_t numKept = 0;
  int32_t begin = 0;
  for (size_t expert = 0; expert < part.offsets.size(); ++expert) {
    const int32_t count = part.numTokensPerExpert[expert];
    const auto align = static_cast<int32_t>(route.align());
    ASSERT_EQ(
        part.offsets[expert], begin + (count + align - 1) / align * align);
    int32_t before = -1;
    for (int32_t row = begin; row < part.offsets[expert]; ++row) {
      const int32_t index = part.receiveIndex[static_cast<size_t>(row)];
      if (row >= begin + count) {
        ASSERT_EQ(index, -1);
        continue;
      }
      ASSERT_GT(index, before);
      ASSERT_EQ(entries.at(static_cast<size_t>(index)), row);
      before = index;
    }
    numKept += count;
    begin = part.offsets[expert];
  }
  ASSERT_EQ(begin, route.numReceiveRows());
  ASSERT_EQ(
      numKept, std::count_if(entries.begin(), entries.end(), [](int32_t entry) {
        return entry >= 0;
      }));
}

void expectSameFacts(const Route& part, const Route& whole) {
  EXPECT_EQ(part.rank(), whole.rank());
  EXPECT_EQ(part.numTokens(), whole.numTokens());
  EXPECT_EQ(part.totalTokens(), whole.totalTokens());
  EXPECT_EQ(part.topK(), whole.topK());
  EXPECT_EQ(part.numExperts(), whole.numExperts());
  EXPECT_EQ(part.align(), whole.align());
  EXPECT_EQ(toIds(part.nodeOfRank()), toIds(whole.nodeOfRank()));
  EXPECT_EQ(toIds(part.reductionMap()), toIds(whole.reductionMap()));
}

/// In the order of the parts, the rows of every list are those of the whole.
void expectWhole(
    const PlanResult& whole, const std::vector<PlanResult>& parts) {
  const Route all(whole.route);
  for (int node = 0; node < all.numNodes(); ++node) {
    Rows expected;
    Rows got;
    appendSends(all, node, expected);
    for (const PlanResult& part : parts) {
      appendSends(Route(part.route), node, got);
    }
    ASSERT_EQ(got, expected);
  }
  for (int source = 0; source < all.size(); ++source) {
    Rows expected;
    Rows got;
    appendLands(whole, all, source, expected);
    for (const PlanResult& part : parts) {
      appendLands(part, Route(part.route), source, got);
    }
    ASSERT_EQ(got, expected);
  }
}

/// Both sides of a list have cut it at the same rows.
void expectSidesAgree(const std::vector<PlanResult>& partOfRank) {
  for (const PlanResult& one : partOfRank) {
    const Route origin(one.route);
    for (const PlanResult& other : partOfRank) {
      const Route expert(other.route);
      const int node = expert.node();
      const int source = origin.rank();
      const size_t sent = origin.sendBegin(node);
      const size_t landed = expert.landBegin(source);
      const size_t count = origin.sendBegin(node + 1) - sent;
      ASSERT_EQ(expert.landBegin(source + 1) - landed, count);
      for (size_t i = 0; i < count; ++i) {
        ASSERT_EQ(
            origin.sendSlots(sent + i).size(),
            expert.entries(landed + i).size());
      }
      ASSERT_EQ(origin.fingerprint(), expert.fingerprint());
    }
  }
}

void expectParts(const PlanCase& it, int numParts) {
  const auto wholes = planAll(it);
  std::vector<std::vector<PlanResult>> byPart(static_cast<size_t>(numParts));
  std::set<uint64_t> fingerprints{Route(wholes[0].route).fingerprint()};
  for (const PlanResult& whole : wholes) {
    const auto parts = cutAll(whole, numParts);
    expectWhole(whole, parts);
    for (size_t i = 0; i < parts.size(); ++i) {
      const Route route(parts[i].route);
      routes::expectWithinBounds(route);
      expectSameFacts(route, Route(whole.route));
      expectReceiveRows(parts[i]);
      fingerprints.insert(route.fingerprint());
      byPart[i].push_back(parts[i]);
    }
  }
  EXPECT_EQ(std::ssize(fingerprints), numParts + 1);
  for (const auto& partOfRank : byPart) {
    expectSidesAgree(partOfRank);
  }
}

TEST(RoutePartTest, PartsMakeUpTheWhole) {
  routes::Random random(3);
  for (int i = 0; i < 150; ++i) {
    SCOPED_TRACE(concat("case ", i));
    const PlanCase it = routes::randomCase(random);
    expectParts(it, static_cast<int>(routes::draw(random, 1, 5)));
    if (::testing::Test::HasFailure()) {
      return;
    }
  }
}

TEST(RoutePartTest, MorePartsThanRows) {
  expectParts(routes::smallCase(), 9);
}

TEST(RoutePartTest, PartZeroStaysOnTheNode) {
  routes::Random random(4);
  PlanCase it;
  it.labels = {0, 1, 0, 1};
  it.topK = 3;
  it.numExperts = 8;
  for (int rank = 0; rank < it.size(); ++rank) {
    it.ids.push_back(routes::randomIds(random, it, 20));
  }
  for (const PlanResult& whole : planAll(it)) {
    const Route all(whole.route);
    const int away = 1 - all.node();
    size_t numAway = 0;
    for (int part = 0; part < 4; ++part) {
      const auto cut = partOfRoute(all, whole.offsets, part, 4);
      const Route route(cut.route);
      const size_t sent = route.sendBegin(away + 1) - route.sendBegin(away);
      EXPECT_EQ(route.numSendRows() - sent == 0, part != 0);
      EXPECT_EQ(sent == 0, part == 0);
      numAway += sent;
      for (int source = 0; source < 4; ++source) {
        const bool here =
            route.nodeOfRank()[static_cast<size_t>(source)] == route.node();
        EXPECT_EQ(
            route.landBegin(source + 1) > route.landBegin(source),
            here == (part == 0));
      }
    }
    EXPECT_EQ(numAway, all.sendBegin(away + 1) - all.sendBegin(away));
  }
}

TEST(RoutePartTest, OnePartIsTheWhole) {
  const auto whole = planAll(routes::smallCase())[0];
  const auto part = partOfRoute(Route(whole.route), whole.offsets, 0, 1);
  EXPECT_EQ(part.receiveIndex, whole.receiveIndex);
  EXPECT_EQ(part.offsets, whole.offsets);
  EXPECT_EQ(part.numTokensPerExpert, whole.numTokensPerExpert);
}

TEST(RoutePartTest, FingerprintTellsTheNumberOfParts) {
  const auto whole = planAll(routes::smallCase())[0];
  const Route all(whole.route);
  EXPECT_NE(
      Route(partOfRoute(all, whole.offsets, 1, 2).route).fingerprint(),
      Route(partOfRoute(all, whole.offsets, 1, 3).route).fingerprint());
}

TEST(RoutePartTest, DroppedStaysDroppedAndUncounted) {
  PlanCase it = routes::smallCase();
  it.align = 1;
  const auto roomy = planAll(it)[0];
  it.maxReceiveTokens = 3;
  const auto whole = planAll(it)[0];
  const Route all(whole.route);
  ASSERT_GT(all.numDropped(), 0);
  int64_t numReceived = 0;
  for (const PlanResult& part : cutAll(whole, 3)) {
    const Route route(part.route);
    EXPECT_EQ(route.numDropped(), 0);
    numReceived += route.numReceiveRows();
  }
  EXPECT_EQ(numReceived, 3);
  EXPECT_EQ(std::ssize(roomy.receiveIndex), 3 + all.numDropped());
}

void expectRefused(
    const PlanResult& whole,
    const Ids& offsets,
    int part,
    int numParts,
    const std::string& text) {
  try {
    partOfRoute(Route(whole.route), offsets, part, numParts);
    FAIL() << "nothing was thrown";
  } catch (const InvalidArgument& error) {
    EXPECT_EQ(std::string(error.what()), text);
  }
}

TEST(RoutePartTest, RefusesWhatCannotBe) {
  const auto whole = planAll(routes::smallCase())[0];  // offsets 4, 8
  const auto numRows = std::to_string(whole.receiveIndex.size());
  const std::string ofParts = ", expected 0 <= part < num_parts";
  expectRefused(
      whole,
      whole.offsets,
      2,
      2,
      "plan_part: part is 2 of num_parts 2" + ofParts);
  expectRefused(
      whole,
      whole.offsets,
      -1,
      2,
      "plan_part: part is -1 of num_parts 2" + ofParts);
  expectRefused(
      whole,
      whole.offsets,
      0,
      0,
      "plan_part: part is 0 of num_parts 0" + ofParts);
  expectRefused(
      whole,
      {4},
      0,
      1,
      "plan_part: offsets has 1 items, expected one for each of the 2 experts "
      "of rank 0");
  expectRefused(
      whole,
      {4, 3},
      0,
      1,
      "plan_part: offsets has 3 after 4, expected ascending ends of at most " +
          numRows + " receive rows");
  expectRefused(
      whole,
      {4, 99},
      0,
      1,
      "plan_part: offsets has 99 after 4, expected ascending ends of at most " +
          numRows + " receive rows");
  expectRefused(
      whole,
      {0, 0},
      0,
      1,
      "plan_part: offsets ends before receive row 0 of the route, expected the "
      "offsets of the same plan");
}

}  // namespace
}  // namespace automoe
