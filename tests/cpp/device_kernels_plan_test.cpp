// SPDX-License-Identifier: Apache-2.0
// The kernels that make a plan's lists, emulated, against the lists that the
// host makes of the same ids.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "device_plans.hpp"
#include "expected_plans.hpp"

namespace automoe::plans {
namespace {

const std::vector<std::vector<int64_t>>& placements() {
  static const std::vector<std::vector<int64_t>> all{
      {0},
      {0, 0, 0, 0},
      {0, 1, 2},
      {0, 0, 1, 1, 2, 2, 3, 3},
      {0, 0, 0, 1, 1, 1},
      {0, 0, 0, 1, 1, 2},
      {0, 1, 0, 1, 2, 0},
      {5, 3, 3, 5, 5}};
  return all;
}

template <class Choices>
auto choose(Random& random, const Choices& choices) {
  return kernels::oneOf(random, choices);
}

/// An id that no expert has now and then.
int32_t randomId(Random& random, const PlanCase& it, bool hasInvalid) {
  if (hasInvalid && draw(random, 0, 9) == 0) {
    const int64_t invalid[] = {
        -2, INT32_MIN, it.numExperts, it.numExperts + 3, INT32_MAX};
    return static_cast<int32_t>(choose(random, invalid));
  }
  return static_cast<int32_t>(draw(random, -1, it.numExperts - 1));
}

PlanCase randomPlan(Random& random, int64_t mostTokens, int64_t mostTopK) {
  PlanCase it;
  it.labels = choose(random, placements());
  it.topK = draw(random, 1, mostTopK);
  it.numExperts = draw(random, 1, draw(random, 0, 1) == 0 ? 7 : 40);
  constexpr int64_t kAligns[] = {1, 4, 16};
  it.align = choose(random, kAligns);
  const int64_t bounds[] = {-1, -1, 0, 7, 40, 100000};
  it.maxReceiveTokens = choose(random, bounds);
  const bool hasInvalid = draw(random, 0, 2) == 0;
  const int64_t most = draw(random, 0, 9) == 0 ? 0 : mostTokens;
  for (int rank = 0; rank < it.size(); ++rank) {
    const int64_t tokens = draw(random, 0, 3) == 0 ? 0 : draw(random, 0, most);
    Ids ids;
    for (int64_t i = 0; i < tokens * it.topK; ++i) {
      ids.push_back(randomId(random, it, hasInvalid));
    }
    it.ids.push_back(ids);
  }
  return it;
}

/// All lists of one rank, or some: `unwanted` of 8 are left out.
void expectLists(
    const HostPlans& host,
    int rank,
    Spread spread,
    int64_t unwanted,
    Random& random) {
  emulated::setSeed(random());
  RankPlan plan(host, rank, spread, random);
  ASSERT_EQ(plan.count(), expectedCounts(host, rank, plan.call().of));
  const RankPlan::Outputs lists =
      plan.list([&] { return draw(random, 0, 7) < unwanted; });
  const ExpectedLists expected(host, rank, plan);
  ASSERT_TRUE(unwanted > 0 || lists.size() == expected.all.size());
  for (const auto& [name, words] : lists) {
    ASSERT_EQ(words, expected.all.at(name)) << name;
  }
}

constexpr Spread kSpreads[] = {
    Spread::kNone, Spread::kStatic, Spread::kRandom, Spread::kRandom};

TEST(PlanKernels, MakeTheListsOfTheHost) {
  Random random(1);
  for (int round = 0; round < 80; ++round) {
    const HostPlans host(randomPlan(random, 20, 9));
    for (int rank = 0; rank < host.asked.size(); ++rank) {
      SCOPED_TRACE(
          ::testing::Message() << "round " << round << " rank " << rank);
      expectLists(
          host,
          rank,
          choose(random, kSpreads),
          draw(random, 0, 1) * draw(random, 0, 8),
          random);
      if (HasFatalFailure()) {
        return;
      }
    }
  }
}

/// One that takes several tiles of slots to sort.
PlanCase longPlan(Random& random, int64_t mostTopK) {
  constexpr size_t kFew = 8000;
  PlanCase it;
  size_t slots = 0;
  while (slots < kFew) {
    it =
        randomPlan(random, 3 * static_cast<int64_t>(kFew) / mostTopK, mostTopK);
    slots = 0;
    for (const Ids& ids : it.ids) {
      slots += ids.size();
    }
  }
  return it;
}

TEST(PlanKernels, MakeLongLists) {
  Random random(2);
  constexpr int64_t kTopKs[] = {9, 9, 9, 40, 300};
  for (const int64_t topK : kTopKs) {
    const HostPlans host(longPlan(random, topK));
    for (int rank = 0; rank < host.asked.size(); rank += 2) {
      SCOPED_TRACE(
          ::testing::Message() << "up to " << topK << " rank " << rank);
      expectLists(host, rank, choose(random, kSpreads), 0, random);
      if (HasFatalFailure()) {
        return;
      }
    }
  }
}

TEST(PlanKernels, TakeFewLaunches) {
  Random random(3);
  PlanCase it;
  it.labels = {0, 0, 1, 1};
  it.topK = 8;
  it.numExperts = 16;
  for (int rank = 0; rank < it.size(); ++rank) {
    it.ids.push_back(routes::randomIds(random, it, 300));
  }
  const HostPlans host(it);
  const uint64_t before = emulated::countLaunches();
  RankPlan plan(host, 1, Spread::kNone, random);
  plan.count();
  plan.list([] { return false; });
  EXPECT_LE(emulated::countLaunches(), before + 15);
}

/// What a change of a plan that is right makes the calls say.
std::string refusal(const std::function<void(CountPlan&)>& change) {
  Random random(4);
  const HostPlans host(routes::smallCase());
  RankPlan plan(host, 0, Spread::kNone, random);
  plan.count();
  CountPlan call = plan.call();
  change(call);
  return routes::textOf<std::invalid_argument>([&] { enqueue(call, nullptr); });
}

TEST(PlanKernels, NameWhatIsNoPlan) {
  const auto expectNamed = [](const char* part, auto change) {
    const std::string text = refusal(change);
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  expectNamed("topK 0", [](CountPlan& it) { it.of.topK = 0; });
  expectNamed("tokens 1073741824, expected 0 to 715827882", [](CountPlan& it) {
    it.of.tokens = int64_t{1} << 30;
  });
  expectNamed("ownTokens 9", [](CountPlan& it) { it.of.ownTokens = 9; });
  expectNamed("mates 80", [](CountPlan& it) { it.of.mates = 80; });
  expectNamed("localRank 2", [](CountPlan& it) { it.of.localRank = 2; });
  expectNamed("rank 4", [](CountPlan& it) { it.of.rank = 4; });
  expectNamed("node -1", [](CountPlan& it) { it.of.node = -1; });
  expectNamed("experts 0", [](CountPlan& it) { it.of.experts = 0; });
  expectNamed("expertsPerRank 1, expected 2", [](CountPlan& it) {
    it.of.expertsPerRank = 1;
  });
  expectNamed("align 0", [](CountPlan& it) { it.of.align = 0; });
  expectNamed(
      "align 715827883", [](CountPlan& it) { it.of.align = 715827883; });
  expectNamed(
      "maxReceiveRows -2", [](CountPlan& it) { it.maxReceiveRows = -2; });
  expectNamed("no sources", [](CountPlan& it) { it.of.sources = nullptr; });
  expectNamed("scratch", [](CountPlan& it) { it.scratch = nullptr; });
}

TEST(PlanKernels, WantTheTablesOfWhatTheyList) {
  int32_t word = 0;
  ListPlan rows;
  rows.receivePacked = &word;
  EXPECT_THROW(enqueue(rows, nullptr), std::invalid_argument);
  ListPlan slots;
  slots.slotPlaces = &word;
  EXPECT_THROW(enqueue(slots, nullptr), std::invalid_argument);
}

TEST(ScanCountsKernel, SumsWhatIsBefore) {
  Random random(5);
  constexpr size_t kCounts[] = {
      0, 1, 31, 300, 2046, 2047, 2048, 2049, 4095, 5000, 300 * 2048};
  for (const size_t count : kCounts) {
    std::vector<uint64_t> expected(count);
    for (uint64_t& value : expected) {
      value = uint64_t{random()} << 32 | random();
    }
    Memory values((count + 1) * sizeof(uint64_t), 0);
    kernels::ScanCounts call;
    call.values = reinterpret_cast<uint64_t*>(values.data());
    std::ranges::copy(expected, call.values);
    expected.push_back(0);
    std::exclusive_scan(
        expected.begin(), expected.end(), expected.begin(), uint64_t{0});
    call.count = count;
    Memory scratch(scratchBytes(call), 0);
    call.scratch = scratch.data();
    enqueue(call, nullptr);
    const std::vector<uint64_t> sums(call.values, call.values + count + 1);
    ASSERT_TRUE(sums == expected) << count << " values";
  }
}

/// Sums of `count` rows, once with terms that lie apart and once without gaps.
struct SumsWithGaps {
  SumsWithGaps(Random& random, size_t count) {
    packedBegins.push_back(0);
    for (size_t row = 0; row < count; ++row) {
      indices.resize(indices.size() + random() % 3, 1 << 30);
      begins.push_back(static_cast<int32_t>(indices.size()));
      for (size_t terms = random() % 7; terms > 0; --terms) {
        const auto index = static_cast<int32_t>(random() % (kRows + 1)) - 1;
        indices.push_back(index);
        packedIndices.push_back(index);
      }
      ends.push_back(static_cast<int32_t>(indices.size()));
      packedBegins.push_back(static_cast<int32_t>(packedIndices.size()));
      if (begins.back() == ends.back()) {  // as for rows that nothing lands in
        begins.back() = 0;
        ends.back() = 0;
      }
    }
  }

  static constexpr size_t kRows = 9;
  Ids begins;
  Ids ends;
  Ids indices;
  Ids packedBegins;
  Ids packedIndices;
};

TEST(ReduceRowsKernel, TakesTermsThatLieApart) {
  Random random(6);
  for (int round = 0; round < 40; ++round) {
    const auto dtype = random() % 2 == 0 ? kernels::DType::kFloat32
                                         : kernels::DType::kBFloat16;
    const size_t elements = 1 + random() % 70;
    const size_t count = random() % 20;
    const SumsWithGaps sums(random, count);
    Memory rows(kernels::randomValues(random, dtype, sums.kRows * elements), 0);
    Memory weights(
        kernels::randomValues(random, kernels::DType::kFloat32, sums.kRows), 0);
    Memory apart(count * elements * elementBytes(dtype), 0);
    Memory packed(apart.size(), 0);
    kernels::ReduceRows call;
    call.dtype = dtype;
    call.count = count;
    call.elements = elements;
    call.rows.at[0] = rows.data();
    call.weights.at[0] = weights.data();
    call.weighted = random() % 2 == 0;
    Words begins(sums.begins);
    Words ends(sums.ends);
    Words indices(sums.indices);
    call.to = apart.data();
    call.termBegin = begins.data();
    call.termEnd = ends.data();
    call.index = indices.data();
    enqueue(call, nullptr);
    call.to = packed.data();
    call.termBegin = sums.packedBegins.data();
    call.termEnd = nullptr;
    call.index = sums.packedIndices.data();
    enqueue(call, nullptr);
    ASSERT_EQ(apart.copy(), packed.copy()) << count << " rows";
  }
}

TEST(ReduceRowsKernel, RefusesTermsThatLieApartInSegments) {
  const int32_t words[2] = {};
  kernels::ReduceRows call;
  call.segmentBegin = words;
  call.termBegin = words;
  call.termEnd = words;
  EXPECT_THROW(enqueue(call, nullptr), std::invalid_argument);
}

}  // namespace
}  // namespace automoe::plans
