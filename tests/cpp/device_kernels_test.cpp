// SPDX-License-Identifier: Apache-2.0
// The kernels that move and sum rows, emulated, against their CPU twins: the
// same bits, whatever the order of blocks and threads.
#include "kernels/device_kernels.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "cuda/device_memory.hpp"
#include "cuda/emulated_cuda.hpp"
#include "kernels/reduce.hpp"
#include "process_group/common/error.hpp"

namespace automoe::kernels {
namespace {

constexpr int kMaxBlocks[] = {0, 1, 3};
constexpr size_t kRowBytes[] = {
    1, 2, 6, 15, 16, 17, 64, 72, 100, 512, 1024, 2048, 2062, 4096, 9000};
constexpr size_t kLengths[] = {1, 2, 3, 7, 8, 9, 64, 65, 130, 512, 1031};

/// Rows of several arrays and an index into them.
struct Source {
  std::deque<Memory> arrays;
  std::vector<int32_t> base;
  std::vector<int32_t> index;
};

constexpr size_t kRowsOfArray = 5;
// The array of a row with a negative index: it must not be looked at.
constexpr int32_t kNoArray = 1 << 30;

std::vector<int32_t> randomIndex(std::mt19937& random, size_t count) {
  std::vector<int32_t> index(count);
  for (int32_t& row : index) {
    row = static_cast<int32_t>(random() % (kRowsOfArray + 1)) - 1;
  }
  return index;
}

Source makeSource(std::mt19937& random, size_t count, size_t rowBytes) {
  Source source;
  const size_t arrays = 1 + random() % 4;
  const size_t offset = oneOf(random, kOffsets);
  for (size_t i = 0; i < arrays; ++i) {
    source.arrays.emplace_back(
        randomBytes(random, kRowsOfArray * rowBytes), offset);
  }
  source.index = randomIndex(random, count);
  for (size_t i = 0; i < count; ++i) {
    const auto base = static_cast<int32_t>(random() % arrays);
    source.base.push_back(source.index[i] < 0 ? kNoArray : base);
  }
  return source;
}

Bytes gathered(Source& source, size_t rowBytes, bool hasBase) {
  Bytes rows(source.index.size() * rowBytes);
  for (size_t i = 0; i < source.index.size(); ++i) {
    if (source.index[i] >= 0) {
      Memory& array =
          source.arrays[hasBase ? static_cast<size_t>(source.base[i]) : 0];
      std::memcpy(
          rows.data() + i * rowBytes,
          array.data() + static_cast<size_t>(source.index[i]) * rowBytes,
          rowBytes);
    }
  }
  return rows;
}

TEST(GatherRowsKernel, CopiesRowsOfAnySizeAndAddress) {
  std::mt19937 random(1);
  for (int round = 0; round < 150; ++round) {
    const size_t rowBytes = oneOf(random, kRowBytes);
    const size_t count = random() % 20;
    Source source = makeSource(random, count, rowBytes);
    const bool hasBase = random() % 2 == 0;
    Memory to(count * rowBytes, oneOf(random, kOffsets));
    GatherRows call;
    call.to = to.data();
    call.count = count;
    call.rowBytes = rowBytes;
    call.base = hasBase ? source.base.data() : nullptr;
    call.index = source.index.data();
    for (size_t i = 0; i < source.arrays.size(); ++i) {
      call.from.at[i] = source.arrays[i].data();
    }
    call.maxBlocks = oneOf(random, kMaxBlocks);
    emulated::setSeed(random());
    enqueue(call, nullptr);
    ASSERT_TRUE(to.copy() == gathered(source, rowBytes, hasBase))
        << count << " rows of " << rowBytes << " bytes, round " << round;
    ASSERT_TRUE(to.isIntact());
  }
}

TEST(GatherRowsKernel, WithoutAnIndexTakesTheRowsInOrder) {
  std::mt19937 random(2);
  Memory from(randomBytes(random, 7 * 80), 0);
  Memory to(7 * 80, 0);
  GatherRows call;
  call.to = to.data();
  call.count = 7;
  call.rowBytes = 80;
  call.from.at[0] = from.data();
  enqueue(call, nullptr);
  EXPECT_TRUE(to.copy() == from.copy());
}

TEST(GatherRowsKernel, WithoutRowsOrBytesLaunchesNothing) {
  const uint64_t before = emulated::countLaunches();
  enqueue(GatherRows{}, nullptr);
  GatherRows call;
  call.count = 4;
  enqueue(call, nullptr);
  enqueue(ReduceRows{}, nullptr);
  enqueue(ScaleAndDot{}, nullptr);
  EXPECT_EQ(emulated::countLaunches(), before);
}

/// Sums of a call and the memory of it.
struct Sums {
  DType dtype;
  size_t elements;
  std::deque<Memory> rows;     // of each array
  std::deque<Memory> weights;  // of each array
  std::vector<int32_t> segmentBegin = {0};
  std::vector<int32_t> termBegin = {0};
  std::vector<int32_t> base;
  std::vector<int32_t> index;
  bool weighted;
  bool hasSegments;

  size_t count() const { return segmentBegin.size() - 1; }
};

void addTerms(std::mt19937& random, Sums& sums) {
  for (size_t terms = random() % 7; terms > 0; --terms) {
    const auto base = static_cast<int32_t>(random() % sums.rows.size());
    sums.index.push_back(randomIndex(random, 1)[0]);
    sums.base.push_back(sums.index.back() < 0 ? kNoArray : base);
  }
  sums.termBegin.push_back(static_cast<int32_t>(sums.index.size()));
}

Sums makeSums(std::mt19937& random, DType dtype) {
  Sums sums;
  sums.dtype = dtype;
  sums.elements = oneOf(random, kLengths);
  sums.weighted = random() % 2 == 0;
  sums.hasSegments = random() % 4 != 0;
  const size_t offset = oneOf(random, kOffsets);
  for (size_t arrays = 1 + random() % 3; arrays > 0; --arrays) {
    sums.rows.emplace_back(
        randomValues(random, dtype, kRowsOfArray * sums.elements), offset);
    sums.weights.emplace_back(
        randomValues(random, sumTypeOf(dtype), kRowsOfArray),
        oneOf(random, kOffsets));
  }
  for (size_t count = random() % 6; count > 0; --count) {
    const size_t segments = sums.hasSegments ? random() % 4 : 1;
    for (size_t i = 0; i < segments; ++i) {
      addTerms(random, sums);
    }
    sums.segmentBegin.push_back(
        static_cast<int32_t>(sums.termBegin.size() - 1));
  }
  return sums;
}

/// One row by reduceRow(), with a row of zeros for a negative index.
void expectRow(Sums& sums, size_t row, std::byte* to) {
  const size_t bytes = sums.elements * elementBytes(sums.dtype);
  const size_t sumSize = sumBytes(sums.dtype);
  const Bytes zeros(bytes);
  const auto first = static_cast<size_t>(sums.segmentBegin[row]);
  const auto last = static_cast<size_t>(sums.segmentBegin[row + 1]);
  const auto begin = static_cast<size_t>(sums.termBegin[first]);
  std::vector<const std::byte*> terms;
  Bytes weights;
  for (size_t t = begin; t < static_cast<size_t>(sums.termBegin[last]); ++t) {
    const auto base = static_cast<size_t>(sums.base[t]);
    Bytes weight(sumSize);
    const std::byte* from = zeros.data();
    if (sums.index[t] >= 0) {
      const auto index = static_cast<size_t>(sums.index[t]);
      from = sums.rows[base].data() + index * bytes;
      std::memcpy(
          weight.data(), sums.weights[base].data() + index * sumSize, sumSize);
    }
    terms.push_back(from);
    weights.insert(weights.end(), weight.begin(), weight.end());
  }
  std::vector<uint32_t> ends;
  for (size_t s = first; s < last; ++s) {
    ends.push_back(
        static_cast<uint32_t>(sums.termBegin[s + 1]) -
        static_cast<uint32_t>(begin));
  }
  reduceRow(
      sums.dtype,
      to,
      terms,
      sums.weighted ? weights.data() : nullptr,
      ends,
      sums.elements);
}

ReduceRows callOf(Sums& sums, Memory& to, int maxBlocks) {
  ReduceRows call;
  call.dtype = sums.dtype;
  call.to = to.data();
  call.count = sums.count();
  call.elements = sums.elements;
  call.segmentBegin = sums.hasSegments ? sums.segmentBegin.data() : nullptr;
  call.termBegin = sums.termBegin.data();
  call.base = sums.base.data();
  call.index = sums.index.data();
  call.weighted = sums.weighted;
  for (size_t i = 0; i < sums.rows.size(); ++i) {
    call.rows.at[i] = sums.rows[i].data();
    call.weights.at[i] = sums.weights[i].data();
  }
  call.maxBlocks = maxBlocks;
  return call;
}

class SumKernels : public testing::TestWithParam<DType> {};

TEST_P(SumKernels, ReduceRowsHasTheBitsOfReduceRow) {
  std::mt19937 random(3);
  for (int round = 0; round < 120; ++round) {
    Sums sums = makeSums(random, GetParam());
    const size_t bytes = sums.elements * elementBytes(sums.dtype);
    Memory to(sums.count() * bytes, oneOf(random, kOffsets));
    emulated::setSeed(random());
    enqueue(callOf(sums, to, oneOf(random, kMaxBlocks)), nullptr);
    Bytes expected(to.size());
    for (size_t row = 0; row < sums.count(); ++row) {
      expectRow(sums, row, expected.data() + row * bytes);
    }
    ASSERT_TRUE(to.copy() == expected)
        << sums.count() << " rows of " << sums.elements << ", round " << round;
    ASSERT_TRUE(to.isIntact());
  }
}

/// Scaled rows and dot products of a call.
struct Scaled {
  DType dtype;
  size_t count;
  size_t elements;
  Memory grads;
  Memory values;
  Memory weights;
  std::vector<int32_t> index;
};

Scaled makeScaled(std::mt19937& random, DType dtype) {
  const size_t count = random() % 12;
  const size_t elements = random() % 8 == 0 ? 0 : oneOf(random, kLengths);
  const DType sumType = sumTypeOf(dtype);
  return {
      dtype,
      count,
      elements,
      {randomValues(random, dtype, count * elements), oneOf(random, kOffsets)},
      {randomValues(random, dtype, count * elements), oneOf(random, kOffsets)},
      {randomValues(random, sumType, count), oneOf(random, kOffsets)},
      randomIndex(random, count)};
}

struct ScaledResult {
  Bytes rows;
  Bytes dots;
};

ScaledResult expectScaled(Scaled& of, bool scale, bool mask) {
  const size_t rowBytes = of.elements * elementBytes(of.dtype);
  const size_t dotBytes = sumBytes(of.dtype);
  ScaledResult result{of.grads.copy(), Bytes(of.count * dotBytes)};
  scaleAndDotRows(
      of.dtype,
      result.rows.data(),
      of.values.data(),
      scale ? of.weights.data() : nullptr,
      result.dots.data(),
      of.count,
      of.elements);
  for (size_t row = 0; mask && row < of.count; ++row) {
    if (of.index[row] < 0) {
      std::fill_n(result.rows.data() + row * rowBytes, rowBytes, std::byte{0});
      std::fill_n(result.dots.data() + row * dotBytes, dotBytes, std::byte{0});
    }
  }
  return result;
}

TEST_P(SumKernels, ScaleAndDotHasTheBitsOfScaleAndDotRows) {
  std::mt19937 random(4);
  for (int round = 0; round < 120; ++round) {
    Scaled of = makeScaled(random, GetParam());
    const bool scale = random() % 3 != 0;
    const bool mask = random() % 3 != 0;
    const ScaledResult expected = expectScaled(of, scale, mask);
    const uint32_t wanted = random() % 3;
    const bool isInPlace = random() % 4 == 0;
    Memory scaled(of.grads.size(), oneOf(random, kOffsets));
    Memory dots(expected.dots.size(), 0);
    Memory& to = isInPlace ? of.grads : scaled;
    ScaleAndDot call;
    call.dtype = of.dtype;
    call.scaled = wanted == 1 ? nullptr : to.data();
    call.dots = wanted == 2 ? nullptr : dots.data();
    call.grads = of.grads.data();
    call.values = wanted == 2 ? nullptr : of.values.data();
    call.weights = scale ? of.weights.data() : nullptr;
    call.index = mask ? of.index.data() : nullptr;
    call.count = of.count;
    call.elements = of.elements;
    call.maxBlocks = oneOf(random, kMaxBlocks);
    emulated::setSeed(random());
    enqueue(call, nullptr);
    SCOPED_TRACE(concat(of.count, " rows of ", of.elements, ", round ", round));
    ASSERT_TRUE(wanted == 1 || to.copy() == expected.rows);
    ASSERT_TRUE(wanted == 2 || dots.copy() == expected.dots);
    ASSERT_TRUE(to.isIntact());
  }
}

INSTANTIATE_TEST_SUITE_P(
    DTypes, SumKernels, testing::ValuesIn(kDTypes), [](const auto& info) {
      return std::string(nameOf(info.param));
    });

}  // namespace
}  // namespace automoe::kernels
