// SPDX-License-Identifier: Apache-2.0
// The allocator against a bitmap of lines, which finds places by looking.
#include "process_group/memory/extent_allocator.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <vector>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

constexpr size_t kLine = ExtentAllocator::kAlignment;

class Bitmap {
 public:
  Bitmap(size_t begin, size_t lines) : begin_(begin), used_(lines) {}

  std::optional<size_t> allocate(size_t bytes) {
    const size_t lines = bytes == 0 ? 1 : (bytes + kLine - 1) / kLine;
    size_t run = 0;
    for (size_t i = 0; i < used_.size(); ++i) {
      run = used_[i] ? 0 : run + 1;
      if (run == lines) {
        const size_t first = i + 1 - lines;
        std::fill_n(
            used_.begin() + static_cast<std::ptrdiff_t>(first), lines, true);
        extents_[begin_ + first * kLine] = lines;
        return begin_ + first * kLine;
      }
    }
    return std::nullopt;
  }
  size_t release(size_t offset) {
    const size_t lines = extents_.at(offset);
    extents_.erase(offset);
    std::fill_n(
        used_.begin() + static_cast<std::ptrdiff_t>((offset - begin_) / kLine),
        lines,
        false);
    return lines * kLine;
  }
  size_t allocatedBytes() const {
    return static_cast<size_t>(std::count(used_.begin(), used_.end(), true)) *
           kLine;
  }
  const std::map<size_t, size_t>& extents() const { return extents_; }

 private:
  size_t begin_;
  std::vector<bool> used_;
  std::map<size_t, size_t> extents_;
};

TEST(ExtentAllocatorTest, AgreesWithABitmapInRandomUse) {
  constexpr size_t kBegin = 4096;
  constexpr size_t kLines = 200;
  ExtentAllocator allocator(kBegin, kBegin + kLines * kLine);
  Bitmap bitmap(kBegin, kLines);
  std::mt19937 random(3);
  int refused = 0;
  for (int step = 0; step < 50000; ++step) {
    // Long stretches that fill it and that empty it.
    const bool grow = random() % 8 < (step / 500 % 2 == 0 ? 6U : 2U);
    if (grow || bitmap.extents().empty()) {
      const size_t bytes = random() % (random() % 10 == 0 ? 3000 : 300);
      const auto expected = bitmap.allocate(bytes);
      ASSERT_EQ(allocator.allocate(bytes), expected) << "step " << step;
      refused += expected.has_value() ? 0 : 1;
    } else {
      auto it = bitmap.extents().begin();
      std::advance(it, random() % bitmap.extents().size());
      const size_t offset = it->first;
      ASSERT_EQ(allocator.release(offset), bitmap.release(offset));
    }
    ASSERT_EQ(allocator.allocatedBytes(), bitmap.allocatedBytes());
    ASSERT_EQ(allocator.numExtents(), bitmap.extents().size());
  }
  EXPECT_GT(refused, 100);
}

TEST(ExtentAllocatorTest, NeighboursJoinInEveryOrderOfRelease) {
  std::vector<int> order = {0, 1, 2, 3};
  do {
    ExtentAllocator allocator(0, 4 * kLine);
    std::vector<size_t> offsets;
    for (int i = 0; i < 4; ++i) {
      offsets.push_back(allocator.allocate(1).value());
    }
    EXPECT_FALSE(allocator.allocate(1).has_value());
    for (const int i : order) {
      EXPECT_EQ(allocator.release(offsets[static_cast<size_t>(i)]), kLine);
    }
    EXPECT_EQ(allocator.allocate(4 * kLine), std::optional<size_t>(0));
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(ExtentAllocatorTest, NothingIsAlsoAnExtent) {
  ExtentAllocator allocator(0, 2 * kLine);
  const auto first = allocator.allocate(0);
  const auto second = allocator.allocate(0);
  ASSERT_TRUE(first.has_value() && second.has_value());
  EXPECT_NE(*first, *second);
}

TEST(ExtentAllocatorTest, WhatIsLargerThanTheRangeIsRefused) {
  ExtentAllocator allocator(0, 4 * kLine);
  EXPECT_FALSE(allocator.allocate(4 * kLine + 1).has_value());
  constexpr size_t kMost = std::numeric_limits<size_t>::max();
  for (const size_t bytes : {kMost, kMost - 1, kMost - kLine, kMost / 2}) {
    EXPECT_FALSE(allocator.allocate(bytes).has_value()) << bytes;
  }
  EXPECT_EQ(allocator.allocatedBytes(), 0);
}

TEST(ExtentAllocatorTest, ReleasingWhatIsNotAllocatedIsAnError) {
  ExtentAllocator allocator(0, 16 * kLine);
  const size_t offset = allocator.allocate(3 * kLine).value();
  EXPECT_THROW(allocator.release(offset + kLine), Error);
  EXPECT_THROW(allocator.release(8 * kLine), Error);
  allocator.release(offset);
  EXPECT_THROW(allocator.release(offset), Error);
}

TEST(ExtentAllocatorTest, BadRangesAreErrors) {
  EXPECT_THROW(ExtentAllocator(1, 4 * kLine), Error);
  EXPECT_THROW(ExtentAllocator(kLine, kLine), Error);
  EXPECT_THROW(ExtentAllocator(2 * kLine, kLine), Error);
}

}  // namespace
}  // namespace automoe
