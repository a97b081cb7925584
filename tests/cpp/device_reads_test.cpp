// SPDX-License-Identifier: Apache-2.0
// Which way a rank reads its node-mates' rows, and that both bring the same.
#include "process_group/exchange/device_reads.hpp"

#include <gtest/gtest.h>

#include <initializer_list>

#include "device_dispatches.hpp"

namespace automoe::testing {
namespace {

using By = ReadChoice::By;
using Rates = std::vector<std::optional<ReadRates>>;

// 1 GB/s is 1000 bytes in a microsecond.
constexpr ReadRates kRates = {
    .engine = 100,
    .kernel = 80,
    .block = 10,
    .memory = 1000,
    .memoryBlock = 50,
    .copyMicroseconds = 5};

/// One mate, local rank 1.
ReadFacts factsOf(double rows, uint64_t areaRows, int maxBlocks = 0) {
  return {
      .maxBlocks = maxBlocks,
      .room = size_t{1} << 40,
      .mates = {{}, {rows, 1000, areaRows * 1000}}};
}

ReadChoice chosen(const ReadFacts& facts, const Rates& rates) {
  return chooseReads(facts, rates).at(1);
}

TEST(DeviceReads, WithoutRatesByKernels) {
  const ReadFacts facts = factsOf(1e9, 1);
  EXPECT_EQ(chosen(facts, {}), ReadChoice{});
  EXPECT_EQ(chosen(facts, {kRates, std::nullopt}), ReadChoice{});
  EXPECT_NE(
      describeReads(facts, chooseReads(facts, {})).at(0).find("is not known"),
      std::string::npos);
}

TEST(DeviceReads, TimesFollowFromBytesAndRates) {
  const ReadChoice choice = chosen(factsOf(1600, 1000), {kRates, kRates});
  EXPECT_DOUBLE_EQ(choice.kernelMicroseconds, 20);
  EXPECT_DOUBLE_EQ(choice.engineMicroseconds, 5 + 10 + 1.6);
  EXPECT_EQ(choice.by, By::kEngine);
  const ReadChoice bounded = chosen(factsOf(1600, 1000, 2), {kRates, kRates});
  EXPECT_DOUBLE_EQ(bounded.kernelMicroseconds, 80);
  EXPECT_DOUBLE_EQ(bounded.engineMicroseconds, 5 + 10 + 16);
}

TEST(DeviceReads, TheFasterWayIsTaken) {
  const Rates rates = {std::nullopt, kRates};
  // A row of the area is read once; few are; each is read twice.
  EXPECT_EQ(chosen(factsOf(1000, 1000), rates).by, By::kKernel);
  EXPECT_EQ(chosen(factsOf(100, 1000), rates).by, By::kKernel);
  EXPECT_EQ(chosen(factsOf(2000, 1000), rates).by, By::kEngine);
  // The same rows in few blocks; and a handful, for which no copy begins.
  EXPECT_EQ(chosen(factsOf(1000, 1000, 1), rates).by, By::kEngine);
  EXPECT_EQ(chosen(factsOf(20, 10), rates).by, By::kKernel);
  EXPECT_EQ(chosen(factsOf(0, 0), rates).by, By::kKernel);
}

TEST(DeviceReads, RoomGoesToThoseWhoGainMost) {
  const ReadFacts facts = {
      .maxBlocks = 1,
      .room = 2500000,
      .mates = {
          {1000, 1000, 1000000},
          {2000, 1000, 2000000},
          {3000, 1000, 2000000},
          {200, 1000, 200000}}};
  const auto choices = chooseReads(facts, Rates(4, kRates));
  EXPECT_EQ(choices[2].by, By::kEngine);
  EXPECT_EQ(choices[1].by, By::kKernel);
  EXPECT_FALSE(choices[1].fits);
  EXPECT_EQ(choices[0].by, By::kKernel);
  EXPECT_EQ(choices[3].by, By::kEngine);
  const auto lines = describeReads(facts, choices);
  ASSERT_EQ(lines.size(), 4U);
  EXPECT_EQ(
      lines[1],
      "local rank 1: read by a kernel, about 2 MB in 1 block of a kernel: 200 "
      "us; by a copy engine, an area of 2 MB in 65 us, but there is no room "
      "for it");
  EXPECT_EQ(
      lines[2],
      "local rank 2: read by a copy engine, an area of 2 MB in 85 us; about 3 "
      "MB in 1 block of a kernel: 300 us");
}

TEST(DeviceReads, WhatIsAssumedFollowsFromTheLink) {
  DeviceFacts hopper;
  hopper.computeMajor = 9;
  hopper.nvlinks = 18;
  const auto nvlink = assumedRates(PairPath::kNvlink, hopper);
  const auto pcie = assumedRates(PairPath::kPcie, hopper);
  ASSERT_TRUE(nvlink.has_value() && pcie.has_value());
  EXPECT_DOUBLE_EQ(nvlink->engine, 0.85 * 450);
  EXPECT_DOUBLE_EQ(nvlink->kernel, 0.75 * 450);
  EXPECT_DOUBLE_EQ(pcie->engine, 0.85 * 64);
  EXPECT_LT(pcie->block, nvlink->block);
  DeviceFacts ampere = hopper;
  ampere.computeMajor = 8;
  ampere.nvlinks = 12;
  EXPECT_DOUBLE_EQ(assumedRates(PairPath::kNvlink, ampere)->engine, 0.85 * 300);
  EXPECT_DOUBLE_EQ(assumedRates(PairPath::kPcie, ampere)->engine, 0.85 * 32);
  DeviceFacts blackwell = hopper;
  blackwell.computeMajor = 10;
  EXPECT_DOUBLE_EQ(
      assumedRates(PairPath::kNvlink, blackwell)->engine, 0.85 * 900);
  EXPECT_EQ(assumedRates(PairPath::kNoPeerAccess, hopper), std::nullopt);
  EXPECT_EQ(assumedRates(PairPath::kUnknown, hopper), std::nullopt);
  EXPECT_EQ(assumedRates(PairPath::kNvlink, DeviceFacts{}), std::nullopt);
  // On one device a copy is one way more.
  const auto same = assumedRates(PairPath::kSameDevice, hopper);
  for (const int maxBlocks : {0, 1, 8}) {
    EXPECT_EQ(
        chosen(factsOf(4000, 1000, maxBlocks), {same, same}).by, By::kKernel);
  }
  EXPECT_EQ(
      describeRates(PairPath::kPcie, *pcie),
      "over PCIe P2P, a kernel reads rows of node-mates at up to 38 GB/s (7 "
      "GB/s for each block), a copy engine their whole area at 54 GB/s after "
      "10 us (assumed, not measured); each call takes the faster");
}

TEST(DeviceReads, RatesOfMatesAreByLocalRank) {
  std::vector<DeviceFacts> ranks(4);
  for (size_t i = 0; i < ranks.size(); ++i) {
    ranks[i].uuid[0] = static_cast<uint8_t>(i + 1);
    ranks[i].computeMajor = 9;
    ranks[i].nvlinks = 18;
  }
  ranks[1].peers = {{ranks[2].uuid, true, true}, {ranks[3].uuid, true, false}};
  const std::vector<int> nodeOf = {0, 1, 1, 1};
  const auto rates = assumedRatesOfMates(ranks, nodeOf, 1);
  ASSERT_EQ(rates.size(), 3U);
  EXPECT_EQ(rates[0], std::nullopt);
  EXPECT_EQ(rates[1], assumedRates(PairPath::kNvlink, ranks[1]));
  EXPECT_EQ(rates[2], assumedRates(PairPath::kPcie, ranks[1]));
  EXPECT_EQ(assumedRatesOfMates(ranks, nodeOf, 0), Rates{std::nullopt});
}

TEST(DeviceReads, EachWayIsExplainedOnce) {
  std::vector<std::string> facts;
  std::vector<DeviceFacts> ranks(4);
  for (size_t i = 0; i < ranks.size(); ++i) {
    ranks[i].ordinal = 0;
    ranks[i].uuid[0] = static_cast<uint8_t>(i + 1);
    ranks[i].computeMajor = 9;
    ranks[i].nvlinks = 18;
  }
  for (DeviceFacts& rank : ranks) {
    for (const DeviceFacts& other : ranks) {
      const bool nvlink = rank.uuid[0] + other.uuid[0] != 4;  // ranks 0 and 2
      rank.peers.push_back({other.uuid, true, nvlink});
    }
    facts.push_back(encodeFacts(rank));
  }
  const std::vector<int> together = {0, 0, 0, 0};
  const auto lines = explainReads(facts, together);
  ASSERT_EQ(lines.size(), 2U);
  EXPECT_EQ(lines[0].find("over NVLink"), 0U);
  EXPECT_EQ(lines[1].find("over PCIe"), 0U);
  const std::vector<int> apart = {0, 1, 2, 3};
  EXPECT_TRUE(explainReads(facts, apart).empty());
  DeviceFacts none;
  none.whyNoDevice = "there is none";
  facts.assign(4, encodeFacts(none));
  EXPECT_TRUE(explainReads(facts, together).empty());
}

TEST(DeviceReads, RowsAreExpectedByEntries) {
  RouteLists lists;
  lists.areas = {{.landEntries = 30}, {.landEntries = 10}, {}};
  lists.receiveBases.count = 20;
  EXPECT_DOUBLE_EQ(expectedRows(lists, 0), 15);
  EXPECT_DOUBLE_EQ(expectedRows(lists, 1), 5);
  EXPECT_DOUBLE_EQ(expectedRows(lists, 2), 0);
  lists.receiveBases.count = 1000;  // mostly padding
  EXPECT_DOUBLE_EQ(expectedRows(lists, 0), 30);
  lists.receivedFrom = {7, 0, 2};  // the host knows
  EXPECT_DOUBLE_EQ(expectedRows(lists, 0), 7);
  EXPECT_DOUBLE_EQ(expectedRows(lists, 1), 0);
  EXPECT_DOUBLE_EQ(expectedRows(lists, 2), 2);
  lists.receivedFrom.clear();
  lists.areas = {{}, {}};
  EXPECT_DOUBLE_EQ(expectedRows(lists, 0), 0);
}

// ---- in a dispatch ----

/// Bytes that the device copied for one dispatch.
uint64_t copiedBy(DeviceRanks& ranks, int rank, DispatchTwin& twin) {
  const uint64_t before = ranks.world().statistics(rank).copiedBytes;
  twin.enqueue();
  twin.finish();
  return ranks.world().statistics(rank).copiedBytes - before;
}

/// The areas of node-mates with tensors of so many bytes in a row and weights
/// of float32, each aligned to 256; none where there is nothing to receive.
uint64_t bytesOfAreas(
    const DispatchTwin& twin, std::initializer_list<size_t> rowBytes) {
  const RouteLists lists = twin.lists();
  const auto self = static_cast<size_t>(twin.topology().localRank());
  const auto aligned = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  uint64_t all = 0;
  for (size_t local = 0; local < lists.areas.size(); ++local) {
    const RouteLists::Area& area = lists.areas[local];
    if (local == self || expectedRows(lists, local) == 0) {
      continue;
    }
    for (const size_t bytes : rowBytes) {
      all += aligned(area.landRows * bytes);
    }
    all += aligned(area.landEntries * sizeof(float));
  }
  return all;
}

class DeviceReadsTest : public ::testing::TestWithParam<Shape> {};

TEST_P(DeviceReadsTest, BothWaysBringTheSame) {
  for (const unsigned seed : {1U, 2U, 3U, 4U}) {
    DeviceRanks ranks(GetParam(), seed);
    const int size = ranks.size();
    const Routing routing = randomRouting(size, 2 * size, 4, 6, seed);
    ranks.run([&](int rank) {
      DispatchTwin twin(
          ranks,
          rank,
          routing,
          {.fields = {{kernels::DType::kBFloat16, 136}, {std::nullopt, 13}},
           .packed = seed % 2 == 0,
           .wire = seed > 2 ? DeviceWire::kFp8 : DeviceWire::kAsIs,
           .maxBlocks = seed == 3 ? 2 : 0,
           .seed = seed});
      twin.enqueue();
      twin.finish();
      const uint64_t byKernels = copiedBy(ranks, rank, twin);
      const auto mates = static_cast<size_t>(twin.topology().localSize());
      ranks.exchange(rank).setReadRates(
          freeCopies(twin.topology().localSize()));
      const uint64_t byEngines = copiedBy(ranks, rank, twin);
      const uint64_t areas = bytesOfAreas(twin, {136 * 2, 13});
      EXPECT_EQ(byEngines - byKernels, areas);
      bool told = false;
      for (const std::string& line : ranks.exchange(rank).describeReads()) {
        told = told || line.find("a copy engine, an") != std::string::npos;
      }
      EXPECT_EQ(told, areas > 0);
      // Only one of the mates, which is read that way.
      Rates one(mates);
      one.back() = kFreeCopies;
      ranks.exchange(rank).setReadRates(one);
      copiedBy(ranks, rank, twin);
    });
    ranks.expectNoErrors();
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    DeviceReadsTest,
    ::testing::Values(
        Shape{{4}}, Shape{{2, 2}}, Shape{{2, 2, 2, 2}}, Shape{{3, 1}}));

}  // namespace
}  // namespace automoe::testing
