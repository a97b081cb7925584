// SPDX-License-Identifier: Apache-2.0
// Plans of all ranks of a group, made in one process, and what they have to be.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "process_group/exchange/route.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe::routes {

using Ids = std::vector<int32_t>;

/// A plan of a group; ids[r] are (T of rank r, topK).
struct PlanCase {
  std::vector<int64_t> labels;
  int64_t topK = 1;
  int64_t numExperts = 1;
  int64_t align = 1;
  int64_t maxReceiveTokens = -1;
  std::vector<int32_t> reductionMap = {};
  std::vector<Ids> ids = {};

  int size() const { return static_cast<int>(labels.size()); }
  Topology topology(int rank) const {
    return Topology::fromNodeLabels(labels, rank);
  }
  int ownerOf(int32_t expert) const {
    const auto chunk = (numExperts + size() - 1) / size();
    return static_cast<int>(expert / chunk);
  }
};

inline RouteBuilder makeBuilder(const PlanCase& it, int rank) {
  PlanArguments arguments;
  const Ids& ids = it.ids[static_cast<size_t>(rank)];
  arguments.topkIds = ids;
  arguments.numTokens = static_cast<int64_t>(ids.size()) / it.topK;
  arguments.topK = it.topK;
  arguments.numExperts = it.numExperts;
  arguments.align = it.align;
  arguments.maxReceiveTokens = it.maxReceiveTokens;
  arguments.reductionMap = it.reductionMap;
  return RouteBuilder(it.topology(rank), arguments);
}

inline std::span<const std::byte> bytesOf(const std::string& list) {
  return std::as_bytes(std::span(list));
}

/// The plan of every rank.
inline std::vector<PlanResult> planAll(const PlanCase& it) {
  std::vector<RouteBuilder> builders;
  for (int rank = 0; rank < it.size(); ++rank) {
    builders.push_back(makeBuilder(it, rank));
  }
  std::vector<PlanResult> results;
  for (int rank = 0; rank < it.size(); ++rank) {
    auto& builder = builders[static_cast<size_t>(rank)];
    const int node = it.topology(rank).node();
    // Lists come in any order.
    for (int i = it.size() - 1; i >= 0; --i) {
      const int source = (rank + i) % it.size();
      builder.add(
          source, bytesOf(builders[static_cast<size_t>(source)].listFor(node)));
    }
    results.push_back(builder.finish());
  }
  return results;
}

using Random = std::mt19937;

inline int64_t draw(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

inline const std::vector<std::vector<int64_t>>& placements() {
  static const std::vector<std::vector<int64_t>> all{
      {0},
      {0, 0, 0, 0},
      {0, 1, 2},
      {0, 0, 1, 1},
      {0, 0, 1, 1, 2, 2, 3, 3},
      {0, 0, 0, 1, 1, 1, 2, 2},
      {0, 1, 0, 1, 2, 0},
      {5, 3, 3, 5, 5}};
  return all;
}

inline Ids randomIds(Random& random, const PlanCase& it, int64_t numTokens) {
  Ids ids;
  for (int64_t i = 0; i < numTokens * it.topK; ++i) {
    ids.push_back(static_cast<int32_t>(draw(random, -1, it.numExperts - 1)));
  }
  return ids;
}

inline PlanCase randomCase(Random& random) {
  PlanCase it;
  const auto last = static_cast<int64_t>(placements().size()) - 1;
  it.labels = placements()[static_cast<size_t>(draw(random, 0, last))];
  it.topK = draw(random, 1, 6);
  it.numExperts = draw(random, 1, 21);
  const std::array<int64_t, 3> aligns{1, 4, 16};
  it.align = aligns[static_cast<size_t>(draw(random, 0, 2))];
  it.maxReceiveTokens = std::max<int64_t>(-1, draw(random, -40, 40));
  if (draw(random, 0, 2) == 0) {
    for (int rank = 0; rank < it.size(); ++rank) {
      it.reductionMap.push_back(static_cast<int32_t>(draw(random, 0, 9)));
    }
  }
  const int64_t most = draw(random, 0, 40);
  for (int rank = 0; rank < it.size(); ++rank) {
    it.ids.push_back(randomIds(random, it, draw(random, 0, most)));
  }
  return it;
}

/// A small case that has a bit of everything.
inline PlanCase smallCase() {
  PlanCase it;
  it.labels = {0, 0, 1, 1};
  it.topK = 3;
  it.numExperts = 7;
  it.align = 4;
  it.ids = {
      {0, 6, 2, -1, -1, -1, 1, 1, 5},
      {3, 2, 1, 6, 5, 4},
      {},
      {0, 2, 4, 5, -1, 6}};
  return it;
}

/// What the exception that the call throws says.
template <typename Exception>
std::string textOf(const std::function<void()>& call) {
  try {
    call();
  } catch (const Exception& error) {
    return error.what();
  }
  return "nothing was thrown";
}

/// Touches all that a route tells and expects it to stay within what the route
/// says of its own sizes.
inline void expectWithinBounds(const Route& route) {
  ASSERT_GE(route.rank(), 0);
  ASSERT_LT(route.rank(), route.size());
  ASSERT_EQ(route.nodeOfRank().size(), static_cast<size_t>(route.size()));
  ASSERT_EQ(route.reductionMap().size(), static_cast<size_t>(route.size()));
  const auto nodes = route.nodeOfRank();
  for (const int32_t node : nodes) {
    ASSERT_TRUE(node >= 0 && node < route.numNodes());
  }
  for (const int32_t label : route.reductionMap()) {
    ASSERT_TRUE(label >= 0 && label < route.size());
  }
  const auto topK = static_cast<size_t>(route.topK());
  ASSERT_EQ(route.sendBegin(0), 0U);
  ASSERT_EQ(route.sendBegin(route.numNodes()), route.numSendRows());
  for (int node = 0; node < route.numNodes(); ++node) {
    ASSERT_LE(route.sendBegin(node), route.sendBegin(node + 1));
    for (size_t i = route.sendBegin(node) + 1; i < route.sendBegin(node + 1);
         ++i) {
      ASSERT_GT(route.sendToken(i), route.sendToken(i - 1));
    }
  }
  for (size_t row = 0; row < route.numSendRows(); ++row) {
    const int64_t token = route.sendToken(row);
    ASSERT_TRUE(token >= 0 && token < route.numTokens());
    const auto slots = route.sendSlots(row);
    ASSERT_TRUE(!slots.empty() && slots.size() <= topK);
    for (const int32_t slot : slots) {
      ASSERT_TRUE(slot >= 0 && slot / route.topK() == token);
    }
  }
  ASSERT_EQ(route.landBegin(0), 0U);
  ASSERT_EQ(route.landBegin(route.size()), route.numLandRows());
  for (int source = 0; source < route.size(); ++source) {
    ASSERT_LE(route.landBegin(source), route.landBegin(source + 1));
  }
  const auto own = nodes.begin() + route.rank();
  const auto localRank = std::count(nodes.begin(), own, *own);
  const auto localSize = std::count(nodes.begin(), nodes.end(), *own);
  for (size_t row = 0; row < route.numLandRows(); ++row) {
    const auto entries = route.entries(row);
    ASSERT_TRUE(!entries.empty() && entries.size() <= topK);
    for (const int32_t entry : entries) {
      if (entry >= 0) {
        ASSERT_LT(entry, route.numReceiveRows());
      } else if (entry != Route::kDropped) {
        ASSERT_LT(~entry, localSize);
        ASSERT_NE(~entry, localRank);
      }
    }
  }
  const size_t sent = route.sendBegin(route.node());
  const size_t landed = route.landBegin(route.rank());
  const size_t count = route.sendBegin(route.node() + 1) - sent;
  ASSERT_EQ(route.landBegin(route.rank() + 1) - landed, count);
  for (size_t i = 0; i < count; ++i) {
    ASSERT_EQ(
        route.sendSlots(sent + i).size(), route.entries(landed + i).size());
  }
}

}  // namespace automoe::routes
