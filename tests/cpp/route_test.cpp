// SPDX-License-Identifier: Apache-2.0
// Plans against plain loops over all ranks' ids.
#include "process_group/exchange/route.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "process_group/common/error.hpp"
#include "routes.hpp"

namespace automoe {
namespace {

using routes::bytesOf;
using routes::Ids;
using routes::makeBuilder;
using routes::planAll;
using routes::PlanCase;

using Rows = std::vector<std::vector<int32_t>>;

/// What one rank's plan has to be, in nested lists.
struct Expected {
  std::vector<size_t> sendBegin{0};
  std::vector<int32_t> tokens;
  Rows slots;
  std::vector<size_t> landBegin{0};
  Rows entries;
  std::vector<int32_t> receiveIndex;
  std::vector<int32_t> counts;
  std::vector<int32_t> offsets;
  int64_t numDropped = 0;
};

/// The slots of a token whose experts are on `node`, by (expert, k).
std::vector<std::pair<int32_t, int32_t>> expertsOn(
    const PlanCase& it, int rank, int64_t token, int node) {
  const Topology topology = it.topology(0);
  std::vector<std::pair<int32_t, int32_t>> found;
  for (int64_t k = 0; k < it.topK; ++k) {
    const auto slot = token * it.topK + k;
    const int32_t id =
        it.ids[static_cast<size_t>(rank)][static_cast<size_t>(slot)];
    if (id >= 0 && topology.nodeOf(it.ownerOf(id)) == node) {
      found.emplace_back(id, static_cast<int32_t>(slot));
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

int64_t numTokensOf(const PlanCase& it, int rank) {
  return static_cast<int64_t>(it.ids[static_cast<size_t>(rank)].size()) /
         it.topK;
}

void expectSends(const PlanCase& it, int rank, Expected& expected) {
  for (int node = 0; node < it.topology(0).numNodes(); ++node) {
    for (int64_t token = 0; token < numTokensOf(it, rank); ++token) {
      std::vector<int32_t> slots;
      for (const auto& [expert, slot] : expertsOn(it, rank, token, node)) {
        slots.push_back(slot);
      }
      if (!slots.empty()) {
        expected.tokens.push_back(static_cast<int32_t>(token));
        expected.slots.push_back(slots);
      }
    }
    expected.sendBegin.push_back(expected.tokens.size());
  }
}

/// Fills entries with experts, and notes who they are: (expert, source, slot).
std::vector<std::tuple<int32_t, int, int32_t>> expectLands(
    const PlanCase& it, int rank, Expected& expected) {
  const int node = it.topology(rank).node();
  std::vector<std::tuple<int32_t, int, int32_t>> all;
  for (int source = 0; source < it.size(); ++source) {
    for (int64_t token = 0; token < numTokensOf(it, source); ++token) {
      std::vector<int32_t> entries;
      for (const auto& [expert, slot] : expertsOn(it, source, token, node)) {
        entries.push_back(expert);
        all.emplace_back(expert, source, slot);
      }
      if (!entries.empty()) {
        expected.entries.push_back(entries);
      }
    }
    expected.landBegin.push_back(expected.entries.size());
  }
  return all;
}

/// The index of each flat entry of expert `expert`, sorted.
std::vector<int32_t> entriesOf(
    const std::vector<std::tuple<int32_t, int, int32_t>>& all, int32_t expert) {
  std::map<std::tuple<int32_t, int, int32_t>, int32_t> sorted;
  for (size_t i = 0; i < all.size(); ++i) {
    if (std::get<0>(all[i]) == expert) {
      sorted[all[i]] = static_cast<int32_t>(i);
    }
  }
  std::vector<int32_t> found;
  for (const auto& [key, index] : sorted) {
    found.push_back(index);
  }
  return found;
}

void expectReceives(const PlanCase& it, int rank, Expected& expected) {
  const auto all = expectLands(it, rank, expected);
  const Topology topology = it.topology(rank);
  std::vector<int32_t*> flat;
  for (auto& entries : expected.entries) {
    for (int32_t& entry : entries) {
      flat.push_back(&entry);
    }
  }
  const bool bounded = it.maxReceiveTokens >= 0;
  auto& index = expected.receiveIndex;
  for (int32_t expert = 0; expert < it.numExperts; ++expert) {
    if (it.ownerOf(expert) != rank) {
      continue;
    }
    int32_t kept = 0;
    for (const int32_t entry : entriesOf(all, expert)) {
      const bool fits = !bounded || std::ssize(index) < it.maxReceiveTokens;
      *flat[static_cast<size_t>(entry)] =
          fits ? static_cast<int32_t>(index.size()) : Route::kDropped;
      expected.numDropped += fits ? 0 : 1;
      kept += fits ? 1 : 0;
      index.push_back(entry);
    }
    while (std::ssize(index) % it.align != 0) {
      index.push_back(-1);
    }
    expected.counts.push_back(kept);
    const auto end = static_cast<int32_t>(index.size());
    expected.offsets.push_back(
        bounded ? std::min(end, static_cast<int32_t>(it.maxReceiveTokens))
                : end);
  }
  if (bounded) {
    index.resize(static_cast<size_t>(it.maxReceiveTokens), -1);
  }
  for (size_t i = 0; i < all.size(); ++i) {
    const int owner = it.ownerOf(std::get<0>(all[i]));
    if (owner != rank) {
      *flat[i] = ~topology.localRankOf(owner);
    }
  }
}

void expectPlan(const PlanCase& it, int rank, const PlanResult& result) {
  Expected expected;
  expectSends(it, rank, expected);
  expectReceives(it, rank, expected);
  const Route route(result.route);
  routes::expectWithinBounds(route);
  ASSERT_EQ(route.rank(), rank);
  ASSERT_EQ(route.size(), it.size());
  ASSERT_EQ(route.numTokens(), numTokensOf(it, rank));
  ASSERT_EQ(route.topK(), it.topK);
  ASSERT_EQ(route.numExperts(), it.numExperts);
  ASSERT_EQ(route.align(), it.align);
  ASSERT_EQ(route.numSendRows(), expected.tokens.size());
  for (size_t node = 0; node < expected.sendBegin.size(); ++node) {
    ASSERT_EQ(
        route.sendBegin(static_cast<int>(node)), expected.sendBegin[node]);
  }
  for (size_t row = 0; row < route.numSendRows(); ++row) {
    const auto slots = route.sendSlots(row);
    ASSERT_EQ(route.sendToken(row), expected.tokens[row]);
    ASSERT_EQ(Ids(slots.begin(), slots.end()), expected.slots[row]);
  }
  ASSERT_EQ(route.numLandRows(), expected.entries.size());
  for (size_t source = 0; source < expected.landBegin.size(); ++source) {
    ASSERT_EQ(
        route.landBegin(static_cast<int>(source)), expected.landBegin[source]);
  }
  for (size_t row = 0; row < route.numLandRows(); ++row) {
    const auto entries = route.entries(row);
    ASSERT_EQ(Ids(entries.begin(), entries.end()), expected.entries[row]);
  }
  EXPECT_EQ(result.receiveIndex, expected.receiveIndex);
  EXPECT_EQ(result.numTokensPerExpert, expected.counts);
  EXPECT_EQ(result.offsets, expected.offsets);
  EXPECT_EQ(route.numReceiveRows(), std::ssize(expected.receiveIndex));
  EXPECT_EQ(route.numDropped(), expected.numDropped);
}

TEST(RouteTest, IsWhatPlainLoopsMake) {
  routes::Random random(1);
  for (int i = 0; i < 400; ++i) {
    SCOPED_TRACE(concat("case ", i));
    const PlanCase it = routes::randomCase(random);
    const auto results = planAll(it);
    int64_t total = 0;
    for (int rank = 0; rank < it.size(); ++rank) {
      total += numTokensOf(it, rank);
    }
    for (int rank = 0; rank < it.size(); ++rank) {
      SCOPED_TRACE(concat("rank ", rank));
      const PlanResult& result = results[static_cast<size_t>(rank)];
      expectPlan(it, rank, result);
      const Route route(result.route);
      EXPECT_EQ(route.totalTokens(), total);
      EXPECT_EQ(
          route.fingerprint(), Route(results.front().route).fingerprint());
      if (::testing::Test::HasFailure()) {
        return;
      }
    }
  }
}

// Counts of two bytes, and experts of two on the node but one of a rank.
TEST(RouteTest, WideCountsAndExperts) {
  routes::Random random(2);
  PlanCase it;
  it.labels = {0, 0, 1};
  it.topK = 300;
  it.numExperts = 700;
  for (const int64_t numTokens : {3, 0, 2}) {
    it.ids.push_back(routes::randomIds(random, it, numTokens));
  }
  const auto results = planAll(it);
  for (int rank = 0; rank < it.size(); ++rank) {
    expectPlan(it, rank, results[static_cast<size_t>(rank)]);
  }
}

TEST(RouteTest, ByHand) {
  PlanCase it;
  it.labels = {0, 0, 1};
  it.topK = 2;
  it.numExperts = 5;  // 0 1 on rank 0, 2 3 on rank 1, 4 on rank 2
  it.align = 2;
  it.ids = {{4, 1, -1, -1, 3, 3}, {}, {1, 0, 1, 4}};
  const auto results = planAll(it);
  const PlanResult& first = results[0];
  const Route route(first.route);
  // Tokens 0 and 2 have experts on node 0, token 0 one on node 1.
  ASSERT_EQ(route.numSendRows(), 3U);
  EXPECT_EQ(route.sendBegin(1), 2U);
  EXPECT_EQ(route.sendToken(1), 2);
  const auto slots = route.sendSlots(1);
  EXPECT_EQ(Ids(slots.begin(), slots.end()), Ids({4, 5}));
  // Of rank 0: expert 1, and twice the mate's 3. Of rank 2: 0 1, then 1.
  ASSERT_EQ(route.numLandRows(), 4U);
  EXPECT_EQ(route.landBegin(1), 2U);
  EXPECT_EQ(route.landBegin(2), 2U);
  const auto all = Ids({2, ~1, ~1, 0, 3, 4});
  for (size_t row = 0; row < 4; ++row) {
    const auto entries = route.entries(row);
    EXPECT_TRUE(std::equal(
        entries.begin(),
        entries.end(),
        all.begin() + static_cast<int64_t>(route.entryBegin(row))));
  }
  EXPECT_EQ(first.receiveIndex, Ids({3, -1, 0, 4, 5, -1}));
  EXPECT_EQ(first.numTokensPerExpert, Ids({1, 3}));
  EXPECT_EQ(first.offsets, Ids({2, 6}));
  EXPECT_EQ(results[2].offsets, Ids({2}));
}

TEST(RouteTest, FewerExpertsThanRanks) {
  PlanCase it;
  it.labels = {0, 1, 0, 1};
  it.numExperts = 2;
  it.ids = {{1}, {0}, {-1}, {}};
  const auto results = planAll(it);
  EXPECT_EQ(results[0].offsets, Ids({1}));
  EXPECT_EQ(results[1].offsets, Ids({1}));
  EXPECT_TRUE(results[2].offsets.empty());
  EXPECT_TRUE(results[3].offsets.empty());
}

TEST(RouteTest, FingerprintChangesWithWhatIsPlanned) {
  const PlanCase it = routes::smallCase();
  const uint64_t before = Route(planAll(it)[2].route).fingerprint();
  PlanCase other = it;
  other.ids[1][0] = 4;
  EXPECT_NE(Route(planAll(other)[2].route).fingerprint(), before);
  other = it;
  std::swap(other.ids[1], other.ids[2]);
  EXPECT_NE(Route(planAll(other)[2].route).fingerprint(), before);
  other = it;
  other.numExperts = 8;
  EXPECT_NE(Route(planAll(other)[2].route).fingerprint(), before);
  other = it;
  other.topK = 1;
  EXPECT_NE(Route(planAll(other)[2].route).fingerprint(), before);
  other = it;
  other.reductionMap = {1, 1, 0, 0};
  EXPECT_NE(Route(planAll(other)[2].route).fingerprint(), before);
  EXPECT_EQ(Route(planAll(it)[2].route).fingerprint(), before);
}

TEST(RouteTest, ReductionMapKeepsTheOrderOfLabels) {
  PlanCase it = routes::smallCase();
  const Route unpinned(planAll(it)[0].route);
  EXPECT_TRUE(unpinned.sumsPerNode());
  EXPECT_EQ(makeBuilder(it, 0).facts().mapHash, 0U);
  it.reductionMap = {3, 3, 8, 8};
  EXPECT_EQ(makeBuilder(it, 0).facts().mapHash, 0U);
  it.reductionMap = {8, 8, 3, 3};
  const auto results = planAll(it);
  const Route turned(results[0].route);
  EXPECT_FALSE(turned.sumsPerNode());
  const auto map = turned.reductionMap();
  EXPECT_EQ(Ids(map.begin(), map.end()), Ids({1, 1, 0, 0}));
  EXPECT_NE(makeBuilder(it, 0).facts().mapHash, 0U);
}

}  // namespace
}  // namespace automoe
