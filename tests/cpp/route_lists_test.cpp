// SPDX-License-Identifier: Apache-2.0
// The lists of a route, followed by hand over all ranks: every receive row and
// every term of every sum is the one that the ids ask for.
#include "process_group/exchange/route_lists.hpp"

#include <gtest/gtest.h>

#include <map>
#include <optional>
#include <tuple>
#include <vector>

#include "process_group/common/error.hpp"
#include "routes.hpp"

namespace automoe {
namespace {

using routes::planAll;
using routes::PlanCase;

/// Which slot of which token of which rank.
using Slot = std::tuple<int, int32_t, int32_t>;  // source, token, k

struct World {
  explicit World(const PlanCase& it) : routing(it), plans(planAll(it)) {
    for (int rank = 0; rank < it.size(); ++rank) {
      const auto i = static_cast<size_t>(rank);
      topologies.push_back(it.topology(rank));
      routes.emplace_back(plans[i].route);
      lists.push_back(makeRouteLists(routes[i], topologies[i]));
      rows.push_back(expectedRows(rank));
    }
  }

  int32_t numTokens(int rank) const {
    return static_cast<int32_t>(
        routing.ids[static_cast<size_t>(rank)].size() /
        static_cast<size_t>(routing.topK));
  }
  int32_t idOf(const Slot& slot) const {
    const auto [source, token, k] = slot;
    return routing.ids[static_cast<size_t>(source)][static_cast<size_t>(
        token * static_cast<int32_t>(routing.topK) + k)];
  }
  Slot slotOf(int source, int32_t flat) const {
    const auto topK = static_cast<int32_t>(routing.topK);
    return {source, flat / topK, flat % topK};
  }
  /// The receive rows of a rank from the ids alone; nothing for padding.
  std::vector<std::optional<Slot>> expectedRows(int rank) const {
    std::vector<std::optional<Slot>> found;
    for (int32_t expert = 0; expert < routing.numExperts; ++expert) {
      if (routing.ownerOf(expert) != rank) {
        continue;
      }
      for (int source = 0; source < routing.size(); ++source) {
        for (int32_t token = 0; token < numTokens(source); ++token) {
          for (int32_t k = 0; k < routing.topK; ++k) {
            if (idOf({source, token, k}) == expert) {
              found.push_back(Slot{source, token, k});
            }
          }
        }
      }
      while (found.size() % static_cast<size_t>(routing.align) != 0) {
        found.emplace_back();
      }
    }
    if (routing.maxReceiveTokens >= 0) {
      found.resize(static_cast<size_t>(routing.maxReceiveTokens));
    }
    return found;
  }

  /// What lies in the land area of a rank: the send row of each of its rows,
  /// and the slot of each of its entries.
  struct LandArea {
    std::vector<std::pair<int, size_t>> rows;  // source, send row
    std::vector<Slot> entries;
  };
  LandArea landArea(int landing) const {
    LandArea area;
    const Topology& topology = topologies[static_cast<size_t>(landing)];
    const int node = topology.node();
    for (int source = 0; source < routing.size(); ++source) {
      const bool mate = topology.nodeOf(source) == node;
      if ((mate ? source : topology.railPeerOf(source, node)) != landing) {
        continue;
      }
      const Route& from = routes[static_cast<size_t>(source)];
      for (size_t row = from.sendBegin(node); row < from.sendBegin(node + 1);
           ++row) {
        area.rows.emplace_back(source, row);
        for (const int32_t slot : from.sendSlots(row)) {
          area.entries.push_back(slotOf(source, slot));
        }
      }
    }
    return area;
  }

  const PlanCase& routing;
  std::vector<PlanResult> plans;
  std::vector<Topology> topologies;
  std::vector<Route> routes;
  std::vector<RouteLists> lists;
  std::vector<std::vector<std::optional<Slot>>> rows;
};

void expectReceived(const World& world, int rank) {
  const auto i = static_cast<size_t>(rank);
  const RouteLists& lists = world.lists[i];
  const auto mates = world.topologies[i].ranksOf(world.topologies[i].node());
  std::vector<World::LandArea> areas;
  for (const int mate : mates) {
    areas.push_back(world.landArea(mate));
    const auto local = areas.size() - 1;
    ASSERT_EQ(lists.areas[local].landRows, areas.back().rows.size());
    ASSERT_EQ(lists.areas[local].landEntries, areas.back().entries.size());
  }
  const auto bases = lists.of(lists.receiveBases);
  const auto rows = lists.of(lists.receiveRows);
  const auto packed = lists.of(lists.receivePacked);
  const auto entries = lists.of(lists.receiveEntries);
  ASSERT_EQ(rows.size(), world.rows[i].size());
  std::vector<size_t> receivedFrom(mates.size(), 0);
  for (size_t r = 0; r < rows.size(); ++r) {
    if (!world.rows[i][r].has_value()) {
      EXPECT_LT(rows[r], 0);
      EXPECT_LT(packed[r], 0);
      EXPECT_LT(entries[r], 0);
      continue;
    }
    const auto [source, token, k] = *world.rows[i][r];
    if (bases[r] == lists.own) {
      EXPECT_EQ(source, rank);
      EXPECT_EQ(rows[r], token);
      EXPECT_EQ(
          world.routes[i].sendToken(static_cast<size_t>(packed[r])), token);
      EXPECT_EQ(world.slotOf(rank, entries[r]), *world.rows[i][r]);
      continue;
    }
    receivedFrom[static_cast<size_t>(bases[r])] += 1;
    const auto& area = areas[static_cast<size_t>(bases[r])];
    const auto [from, sendRow] = area.rows[static_cast<size_t>(rows[r])];
    EXPECT_EQ(packed[r], rows[r]);
    EXPECT_EQ(from, source);
    EXPECT_EQ(
        world.routes[static_cast<size_t>(from)].sendToken(sendRow), token);
    EXPECT_EQ(area.entries[static_cast<size_t>(entries[r])], *world.rows[i][r]);
  }
  EXPECT_EQ(lists.receivedFrom, receivedFrom);
}

/// Every term of the sums that `rank` lands, as its slot.
void expectTerms(const World& world, int rank) {
  const auto i = static_cast<size_t>(rank);
  const RouteLists& lists = world.lists[i];
  const Topology& topology = world.topologies[i];
  const auto area = world.landArea(rank);
  const auto begins = lists.of(lists.termBegins);
  const auto bases = lists.of(lists.termBases);
  const auto terms = lists.of(lists.termRows);
  ASSERT_EQ(begins.size(), area.rows.size() + 1);
  ASSERT_EQ(terms.size(), area.entries.size());
  size_t term = 0;
  for (size_t row = 0; row < area.rows.size(); ++row) {
    const auto [source, sendRow] = area.rows[row];
    const auto slots =
        world.routes[static_cast<size_t>(source)].sendSlots(sendRow);
    EXPECT_EQ(static_cast<size_t>(begins[row]), term);
    for (const int32_t flat : slots) {
      const Slot slot = world.slotOf(source, flat);
      const int owner = world.routing.ownerOf(world.idOf(slot));
      const bool own = bases[term] == lists.own;
      const int base =
          own ? rank
              : topology.ranksOf(
                    topology.node())[static_cast<size_t>(bases[term])];
      EXPECT_EQ(base, owner);
      int32_t receiveRow = terms[term];
      if (!own) {
        const RouteLists& theirs = world.lists[static_cast<size_t>(owner)];
        receiveRow =
            theirs.of(theirs.stageRows)[static_cast<size_t>(terms[term])];
      }
      const auto& held = world.rows[static_cast<size_t>(owner)];
      const bool dropped =
          std::find(held.begin(), held.end(), std::optional(slot)) ==
          held.end();
      EXPECT_EQ(receiveRow < 0, dropped);
      if (receiveRow >= 0) {
        EXPECT_EQ(held[static_cast<size_t>(receiveRow)], slot);
      }
      term += 1;
    }
  }
  EXPECT_EQ(static_cast<size_t>(begins.back()), term);
}

void expectTokens(const World& world, int rank) {
  const auto i = static_cast<size_t>(rank);
  const Route& route = world.routes[i];
  const RouteLists& lists = world.lists[i];
  const auto begins = lists.of(lists.tokenBegins);
  const auto terms = lists.of(lists.tokenTerms);
  for (int32_t token = 0; token < world.numTokens(rank); ++token) {
    std::vector<int32_t> expected;
    for (size_t row = 0; row < route.numSendRows(); ++row) {
      if (route.sendToken(row) == token) {
        expected.push_back(static_cast<int32_t>(row));
      }
    }
    const auto at = static_cast<size_t>(token);
    const auto begin = terms.begin() + begins[at];
    EXPECT_EQ(
        std::vector<int32_t>(begin, terms.begin() + begins[at + 1]), expected);
  }
  const auto slots = lists.of(lists.sendSlots);
  const auto places = lists.of(lists.slotPlaces);
  for (size_t flat = 0; flat < places.size(); ++flat) {
    const Slot slot = world.slotOf(rank, static_cast<int32_t>(flat));
    EXPECT_EQ(places[flat] < 0, world.idOf(slot) < 0);
    if (places[flat] >= 0) {
      EXPECT_EQ(
          slots[static_cast<size_t>(places[flat])], static_cast<int32_t>(flat));
    }
  }
}

void expectAll(const PlanCase& it) {
  const World world(it);
  for (int rank = 0; rank < it.size(); ++rank) {
    SCOPED_TRACE("rank " + std::to_string(rank));
    expectReceived(world, rank);
    expectTerms(world, rank);
    expectTokens(world, rank);
  }
}

TEST(RouteLists, SmallCase) {
  PlanCase it = routes::smallCase();
  it.reductionMap = {};
  expectAll(it);
}

TEST(RouteLists, RandomCases) {
  routes::Random random(7);
  for (int i = 0; i < 300 && !::testing::Test::HasFailure(); ++i) {
    PlanCase it = routes::randomCase(random);
    SCOPED_TRACE("case " + std::to_string(i));
    expectAll(it);
  }
}

TEST(RouteLists, NothingAtAll) {
  PlanCase it;
  it.labels = {0, 0, 1};
  it.topK = 2;
  it.numExperts = 5;
  it.ids = {{}, {-1, -1, -1, -1}, {}};
  expectAll(it);
}

}  // namespace
}  // namespace automoe
