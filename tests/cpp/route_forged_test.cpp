// SPDX-License-Identifier: Apache-2.0
// Lists and words that are not what they should be.
#include <gtest/gtest.h>

#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "process_group/common/error.hpp"
#include "process_group/exchange/route.hpp"
#include "routes.hpp"

namespace automoe {
namespace {

using routes::bytesOf;
using routes::draw;
using routes::Ids;
using routes::makeBuilder;
using routes::planAll;
using routes::PlanCase;
using routes::textOf;

constexpr int32_t kMost = std::numeric_limits<int32_t>::max();

TEST(RouteForgedTest, FactsDisagree) {
  const PlanCase it = routes::smallCase();
  PlanCase other = it;
  const std::string same = "; all ranks of a plan must pass the same";
  const auto both = [&](int one, int two) {
    return textOf<InvalidArgument>([&] {
      makeBuilder(it, one).add(
          two,
          bytesOf(makeBuilder(other, two).listFor(it.topology(one).node())));
    });
  };
  other.numExperts = 16;
  const std::string experts =
      "plan: rank 1 has num_experts 7, rank 3 has 16" + same;
  EXPECT_EQ(both(1, 3), experts);
  EXPECT_EQ(both(3, 1), "plan: rank 1 has num_experts 16, rank 3 has 7" + same);
  other = it;
  other.topK = 1;
  EXPECT_EQ(both(0, 1), "plan: rank 0 has topk 3, rank 1 has 1" + same);
  other = it;
  other.reductionMap = {1, 1, 0, 0};
  const std::string maps = both(0, 1);
  EXPECT_TRUE(maps.starts_with(
      "plan: rank 0 has reduction_map of the topology, rank 1 has with hash "))
      << maps;
  EXPECT_TRUE(maps.ends_with(same)) << maps;
}

TEST(RouteForgedTest, ListsTwiceMissingOrFromNowhere) {
  const PlanCase it = routes::smallCase();
  RouteBuilder builder = makeBuilder(it, 0);
  const std::string own = builder.listFor(0);
  builder.add(0, bytesOf(own));
  EXPECT_EQ(
      textOf<TransportError>([&] { builder.add(0, bytesOf(own)); }),
      "the plan of rank 0 came twice");
  EXPECT_EQ(
      textOf<TransportError>([&] { builder.add(4, bytesOf(own)); }),
      "the plan of rank 4 in a group of 4");
  EXPECT_EQ(
      textOf<TransportError>([&] { builder.add(-1, bytesOf(own)); }),
      "the plan of rank -1 in a group of 4");
  EXPECT_NE(
      textOf<Error>([&] {
        builder.finish();
      }).find("the plan of rank 1 has not come"),
      std::string::npos);
  RouteBuilder fresh = makeBuilder(it, 0);
  const std::string foreign = makeBuilder(it, 1).listFor(0);
  EXPECT_EQ(
      textOf<TransportError>([&] { fresh.add(0, bytesOf(foreign)); }),
      "the plan of rank 0 (this rank) is not what it made");
}

TEST(RouteForgedTest, FinishesOnce) {
  PlanCase it;
  it.labels = {0};
  it.ids = {{0}};
  RouteBuilder builder = makeBuilder(it, 0);
  builder.add(0, bytesOf(builder.listFor(0)));
  builder.finish();
  EXPECT_NE(
      textOf<Error>([&] {
        builder.finish();
      }).find("a plan was finished twice"),
      std::string::npos);
}

/// A builder of rank 0 of the small case that lacks the list of rank 1 only.
RouteBuilder nearlyComplete(const PlanCase& it) {
  RouteBuilder builder = makeBuilder(it, 0);
  for (const int source : {0, 2, 3}) {
    builder.add(source, bytesOf(makeBuilder(it, source).listFor(0)));
  }
  return builder;
}

TEST(RouteForgedTest, ListsOfAnotherLength) {
  const PlanCase it = routes::smallCase();
  const RouteBuilder builder = nearlyComplete(it);
  const std::string list = makeBuilder(it, 1).listFor(0);
  for (size_t size = 0; size < list.size(); ++size) {
    // Of its own size, so that a sanitizer sees a read behind its end.
    const std::vector<char> cut(list.begin(), list.begin() + int64_t(size));
    RouteBuilder copy = builder;
    EXPECT_TRUE(textOf<TransportError>([&] {
                  copy.add(1, std::as_bytes(std::span(cut)));
                }).starts_with("the plan of rank 1: "))
        << size;
  }
  RouteBuilder copy = builder;
  EXPECT_TRUE(textOf<TransportError>([&] {
                copy.add(1, bytesOf(list + 'x'));
              }).starts_with("the plan of rank 1: "));
}

TEST(RouteForgedTest, ListsWithOtherBytes) {
  const PlanCase it = routes::smallCase();
  const RouteBuilder builder = nearlyComplete(it);
  const std::string list = makeBuilder(it, 1).listFor(0);
  int numRefused = 0;
  for (size_t at = 0; at < list.size(); ++at) {
    for (int value = 0; value < 256; ++value) {
      std::vector<char> forged(list.begin(), list.end());
      forged[at] = static_cast<char>(value);
      RouteBuilder copy = builder;
      try {
        copy.add(1, std::as_bytes(std::span(forged)));
        const PlanResult result = copy.finish();
        routes::expectWithinBounds(Route(result.route));
      } catch (const TransportError&) {
        numRefused += 1;
      } catch (const InvalidArgument&) {
        numRefused += 1;  // the facts
      }
    }
  }
  EXPECT_GT(numRefused, 1000);
}

TEST(RouteForgedTest, ListsWithImpossibleRows) {
  const PlanCase it = routes::smallCase();  // 4 experts on node 0
  const RouteBuilder builder = nearlyComplete(it);
  // Facts, rows 2, counts 3 2 (3 2 1 there, 6 5 4 is away).
  const std::string list = makeBuilder(it, 1).listFor(0);
  ASSERT_EQ(list.size(), 40U + 4 + 1 + 3);
  const auto refusal = [&](size_t at, char value) {
    std::string forged = list;
    forged[at] = value;
    RouteBuilder copy = builder;
    return textOf<TransportError>([&] { copy.add(1, bytesOf(forged)); });
  };
  const std::string who = "the plan of rank 1: ";
  EXPECT_EQ(refusal(40, 3), who + "3 rows of 2 tokens");
  EXPECT_EQ(refusal(44, 0), who + "a row does not have 1 to 3 experts");
  EXPECT_EQ(refusal(44, 4), who + "a row does not have 1 to 3 experts");
  EXPECT_EQ(refusal(44, 2), who + "2 experts of 1 bytes in 3 bytes");
  EXPECT_EQ(refusal(45, 4), who + "an expert that is not one of 4 here");
  EXPECT_EQ(refusal(23, '\x7f').find(who + "it says it has "), 0U);
}

/// Reads all of a route whose words may be anything; true when it was refused.
bool isRefused(const Ids& words, const PlanResult& whole) {
  // Of its own size, so that a sanitizer sees a read behind its end.
  const auto exact = std::make_unique<int32_t[]>(words.size());
  std::copy(words.begin(), words.end(), exact.get());
  try {
    const Route route(std::span<const int32_t>(exact.get(), words.size()));
    routes::expectWithinBounds(route);
    // Forged sizes may be legal, and then take gigabytes.
    if (route.numReceiveRows() < 1000 && route.align() < 1000) {
      const auto part = partOfRoute(route, whole.offsets, 1, 3);
      routes::expectWithinBounds(Route(part.route));
    }
  } catch (const InvalidArgument&) {
    return true;
  }
  return false;
}

int32_t forgedWord(routes::Random& random, int32_t word) {
  const std::vector<int32_t> values{
      0,
      1,
      -1,
      -2,
      2,
      3,
      7,
      kMost,
      kMost - 1,
      Route::kDropped,
      static_cast<int32_t>(static_cast<uint32_t>(word) + 1),
      static_cast<int32_t>(static_cast<uint32_t>(word) - 1),
      static_cast<int32_t>(random()),
      static_cast<int32_t>(draw(random, -20, 20))};
  return values[static_cast<size_t>(draw(random, 0, std::ssize(values) - 1))];
}

TEST(RouteForgedTest, WordsWithOneFlipped) {
  routes::Random random(5);
  int numRefused = 0;
  int numTried = 0;
  for (const PlanResult& whole : planAll(routes::smallCase())) {
    ASSERT_FALSE(isRefused(whole.route, whole));
    for (size_t at = 0; at < whole.route.size(); ++at) {
      for (int i = 0; i < 40; ++i) {
        Ids words = whole.route;
        words[at] = forgedWord(random, words[at]);
        numTried += 1;
        numRefused += isRefused(words, whole) ? 1 : 0;
      }
    }
  }
  EXPECT_GT(numRefused, numTried / 2);
}

TEST(RouteForgedTest, WordsWithSomeFlipped) {
  routes::Random random(6);
  for (int i = 0; i < 4000; ++i) {
    const PlanCase it =
        i % 50 == 0 ? routes::randomCase(random) : routes::smallCase();
    const auto results = planAll(it);
    const auto rank =
        static_cast<size_t>(draw(random, 0, std::ssize(results) - 1));
    Ids words = results[rank].route;
    for (int64_t flips = draw(random, 2, 4); flips > 0; --flips) {
      const auto at =
          static_cast<size_t>(draw(random, 0, std::ssize(words) - 1));
      words[at] = forgedWord(random, words[at]);
    }
    isRefused(words, results[rank]);
  }
}

TEST(RouteForgedTest, WordsWithATokenTwice) {
  PlanCase it;
  it.labels = {0};
  it.ids = {{0, 0}};
  Ids words = planAll(it)[0].route;
  const auto sections = sectionsOf(readRouteHeader(words), std::span(words));
  sections.sendTokens[1] = 0;
  sections.slots[1] = 0;
  EXPECT_EQ(
      textOf<InvalidArgument>([&] { Route{words}; }),
      "route: the send rows to node 0 are not sorted by token; expected the "
      "words that a plan made");
}

TEST(RouteForgedTest, WordsOfAnotherLength) {
  const auto whole = planAll(routes::smallCase())[0];
  for (size_t size = 0; size < whole.route.size(); ++size) {
    const Ids cut(whole.route.begin(), whole.route.begin() + int64_t(size));
    EXPECT_TRUE(isRefused(cut, whole)) << size;
  }
  Ids longer = whole.route;
  longer.push_back(0);
  EXPECT_EQ(
      textOf<InvalidArgument>([&] { Route{longer}; }),
      concat(
          "route: got ",
          longer.size(),
          " words, not ",
          whole.route.size(),
          "; expected the words that a plan made"));
}

TEST(RouteForgedTest, AsksForNodesAndRanksThatExist) {
  const auto whole = planAll(routes::smallCase())[0];
  const Route route(whole.route);
  EXPECT_THROW(route.sendBegin(-1), Error);
  EXPECT_THROW(route.sendBegin(3), Error);
  EXPECT_THROW(route.landBegin(-1), Error);
  EXPECT_THROW(route.landBegin(5), Error);
}

}  // namespace
}  // namespace automoe
