// SPDX-License-Identifier: Apache-2.0
// The kernels that make lists of rows and compare them, emulated, against lists
// made here one slot after the other.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device_memory.hpp"
#include "cuda/emulated_cuda.hpp"
#include "kernels/device_kernels.hpp"
#include "kernels/rows.hpp"
#include "process_group/common/error.hpp"

namespace automoe::kernels {
namespace {

constexpr int kMaxBlocks[] = {0, 1, 3};
// In and over the range of one pass, and of no id at all.
constexpr size_t kExperts[] = {1, 3, 8, 64, 256, 1023, 1024, 1025, 2500};
// Below, at and over a tile, and of several.
constexpr size_t kCounts[] = {0, 1, 31, 33, 128, 1000, 2047, 2048, 2049, 4500};
constexpr size_t kAligns[] = {1, 1, 4, 16};

std::vector<int32_t> randomIds(
    std::mt19937& random, size_t count, size_t experts) {
  std::vector<int32_t> ids(count);
  const bool isSkewed = random() % 3 == 0;
  for (int32_t& id : ids) {
    const uint32_t kind = random() % 16;
    id = static_cast<int32_t>(random() % experts);
    if (isSkewed && kind > 3) {
      id = static_cast<int32_t>(experts - 1);
    } else if (kind == 0) {
      id = -1 - static_cast<int32_t>(random() % 2) * 0x7FFFFFFF;
    } else if (kind == 1) {
      id = static_cast<int32_t>(experts + random() % 2000);
    }
  }
  return ids;
}

/// The lists of a permutation.
struct Lists {
  std::vector<int32_t> counts;
  std::vector<int32_t> ends;
  std::vector<int32_t> index;

  bool operator==(const Lists&) const = default;
};

Lists expectedLists(
    const std::vector<int32_t>& ids, size_t experts, size_t align) {
  Lists lists;
  std::vector<std::vector<int32_t>> slots(experts);
  for (size_t slot = 0; slot < ids.size(); ++slot) {
    if (ids[slot] >= 0 && static_cast<size_t>(ids[slot]) < experts) {
      slots[static_cast<size_t>(ids[slot])].push_back(
          static_cast<int32_t>(slot));
    }
  }
  for (std::vector<int32_t>& rows : slots) {
    lists.counts.push_back(static_cast<int32_t>(rows.size()));
    while (rows.size() % align != 0) {
      rows.push_back(-1);
    }
    lists.index.insert(lists.index.end(), rows.begin(), rows.end());
    lists.ends.push_back(static_cast<int32_t>(lists.index.size()));
  }
  return lists;
}

Lists sortedLists(
    const std::vector<int32_t>& ids,
    size_t experts,
    size_t align,
    size_t rows) {
  Lists lists;
  lists.counts.assign(experts, -7);
  lists.ends.assign(experts, -7);
  lists.index.assign(rows, -7);
  SortSlots call;
  call.ids = ids.data();
  call.count = ids.size();
  call.experts = experts;
  call.align = align;
  call.counts = lists.counts.data();
  call.ends = lists.ends.data();
  call.index = lists.index.data();
  call.rows = rows;
  Memory scratch(scratchBytes(call), 0);
  call.scratch = scratch.data();
  enqueue(call, nullptr);
  return lists;
}

TEST(SortSlotsKernel, PlacesSlotsByExpertInTheirOrder) {
  std::mt19937 random(1);
  for (int round = 0; round < 40; ++round) {
    const size_t experts = oneOf(random, kExperts);
    const size_t align = oneOf(random, kAligns);
    const auto ids = randomIds(random, oneOf(random, kCounts), experts);
    Lists expected = expectedLists(ids, experts, align);
    // As many rows as there are, as there can be, or too few.
    const size_t most = ids.size() + experts * (align - 1);
    const size_t exact = expected.index.size();
    const size_t sizes[] = {exact, most, exact / 2};
    expected.index.resize(oneOf(random, sizes), -1);
    emulated::setSeed(random());
    ASSERT_TRUE(
        sortedLists(ids, experts, align, expected.index.size()) == expected)
        << ids.size() << " ids, " << experts << " experts, align " << align;
  }
}

TEST(SortSlotsKernel, SumsMoreTilesThanAWarpHasLanes) {
  std::mt19937 random(6);
  constexpr size_t kManyTiles = 70 * 2048;
  const auto ids = randomIds(random, kManyTiles, 3);
  const Lists expected = expectedLists(ids, 3, 1);
  EXPECT_TRUE(sortedLists(ids, 3, 1, expected.index.size()) == expected);
}

TEST(SortSlotsKernel, TakesOneLaunchForFewSlots) {
  std::mt19937 random(2);
  const uint64_t before = emulated::countLaunches();
  sortedLists(randomIds(random, 2048, 256), 256, 1, 2048);
  EXPECT_EQ(emulated::countLaunches(), before + 1);
}

TEST(SortSlotsKernel, NamesWhatMakesTooManyRows) {
  SortSlots call;
  call.experts = 1 << 20;
  call.align = 1 << 20;
  EXPECT_THROW(enqueue(call, nullptr), std::invalid_argument);
  call.align = 0;
  EXPECT_THROW(enqueue(call, nullptr), std::invalid_argument);
}

TEST(CountIdsKernel, CountsWhatIsInRange) {
  std::mt19937 random(3);
  constexpr size_t kMore[] = {0, 1, 700, 8192, 8193, 20000};
  for (int round = 0; round < 40; ++round) {
    const size_t experts = oneOf(random, kExperts);
    const auto ids = randomIds(random, oneOf(random, kMore), experts);
    std::vector<int32_t> expected(experts);
    countIds(ids, expected);
    std::vector<int32_t> counts(experts, -7);
    emulated::setSeed(random());
    enqueue(CountIds{ids.data(), ids.size(), counts.data(), experts}, nullptr);
    ASSERT_EQ(counts, expected) << ids.size() << " ids";
  }
}

constexpr size_t kRowBytes[] = {
    0, 1, 3, 7, 8, 9, 16, 63, 64, 72, 600, 1024, 2064, 5001};

TEST(SameRowsKernel, FindsEachDifference) {
  std::mt19937 random(4);
  constexpr size_t kRows = 4;
  for (int round = 0; round < 120; ++round) {
    const size_t rowBytes = oneOf(random, kRowBytes);
    Bytes a = randomBytes(random, kRows * rowBytes);
    Bytes b = a;
    for (size_t row = 1; row < kRows && rowBytes > 0; ++row) {  // row 0 is same
      b[row * rowBytes + random() % rowBytes] ^= std::byte{0x10};
    }
    Memory left(a, oneOf(random, kOffsets));
    Memory right(b, oneOf(random, kOffsets));
    const size_t count = random() % 30;
    std::vector<int32_t> first;
    std::vector<int32_t> second;
    std::vector<uint8_t> expected;
    for (size_t i = 0; i < count; ++i) {
      first.push_back(static_cast<int32_t>(random() % 5) - 1);
      second.push_back(
          random() % 4 == 0 ? static_cast<int32_t>(random() % 5) - 1
                            : first.back());
      const bool isSame =
          first[i] >= 0 && second[i] >= 0 &&
          sameRow(
              a.data() + static_cast<size_t>(first[i]) * rowBytes,
              b.data() + static_cast<size_t>(second[i]) * rowBytes,
              rowBytes);
      expected.push_back(isSame ? 1 : 0);
    }
    std::vector<uint8_t> same(count, 9);
    SameRows call;
    call.a = left.data();
    call.b = right.data();
    call.first = first.data();
    call.second = second.data();
    call.count = count;
    call.rowBytes = rowBytes;
    call.same = same.data();
    call.maxBlocks = oneOf(random, kMaxBlocks);
    emulated::setSeed(random());
    enqueue(call, nullptr);
    ASSERT_EQ(same, expected) << "rows of " << rowBytes;
  }
}

TEST(ProbeRowsKernel, HasTheHashesOfProbeRow) {
  std::mt19937 random(5);
  for (int round = 0; round < 80; ++round) {
    const size_t rowBytes = oneOf(random, kRowBytes);
    const size_t count = random() % 50;
    Memory rows(randomBytes(random, count * rowBytes), oneOf(random, kOffsets));
    std::vector<uint64_t> expected;
    for (size_t i = 0; i < count; ++i) {
      expected.push_back(probeRow(rows.data() + i * rowBytes, rowBytes));
    }
    std::vector<uint64_t> probes(count);
    ProbeRows call;
    call.rows = rows.data();
    call.count = count;
    call.rowBytes = rowBytes;
    call.probes = probes.data();
    call.maxBlocks = oneOf(random, kMaxBlocks);
    emulated::setSeed(random());
    enqueue(call, nullptr);
    ASSERT_EQ(probes, expected) << "rows of " << rowBytes;
  }
}

}  // namespace
}  // namespace automoe::kernels
