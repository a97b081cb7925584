// SPDX-License-Identifier: Apache-2.0
// Sums of rows: every variant against one written here in another way.
#include "kernels/reduce.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/reduce_variant.hpp"
#include "numbers.hpp"
#include "process_group/common/error.hpp"

namespace automoe::kernels {
namespace {

/// What is summed, and the memory of it.
struct Sums {
  DType dtype;
  size_t elements;
  std::vector<Values> rows;
  std::vector<Values> weights;  // one block, or none
  std::vector<uint32_t> ends;

  const void* weightData() const {
    return weights.empty() ? nullptr : weights[0].data();
  }
  std::vector<const std::byte*> rowData() const {
    std::vector<const std::byte*> data;
    for (const Values& row : rows) {
      data.push_back(row.data());
    }
    return data;
  }
};

Sums makeSums(
    std::mt19937& random,
    DType dtype,
    size_t elements,
    size_t numRows,
    bool weighted) {
  Sums sums{dtype, elements, {}, {}, {}};
  withNumber(dtype, [&](auto number) {
    using Chosen = decltype(number);
    for (size_t i = 0; i < numRows; ++i) {
      fill<Chosen>(random, sums.rows.emplace_back(elements * Chosen::kBytes));
    }
    if (weighted) {
      using Weight = NumberOfSum<Chosen>;
      Values& weights = sums.weights.emplace_back(numRows * Weight::kBytes);
      if (numRows > 0) {
        fill<Weight>(random, weights);
      }
    }
  });
  return sums;
}

template <class Number>
Bytes expectedSums(const Sums& sums) {
  using Sum = typename Number::Sum;
  Bytes out(sums.elements * Number::kBytes);
  for (size_t h = 0; h < sums.elements; ++h) {
    std::vector<Sum> rounded;
    size_t i = 0;
    for (const uint32_t end : sums.ends) {
      std::vector<Sum> products;
      for (; i < end; ++i) {
        Sum weight = 1;
        if (!sums.weights.empty()) {
          const std::byte* from = sums.weights[0].data() + i * sizeof(Sum);
          std::memcpy(&weight, from, sizeof(Sum));
        }
        const Sum value =
            Number::read(sums.rows[i].data() + h * Number::kBytes);
        products.push_back(sums.weights.empty() ? value : weight * value);
      }
      for (size_t j = 1; j < products.size(); ++j) {
        products[0] += products[j];
      }
      if (!products.empty()) {
        rounded.push_back(Number::round(products[0]));
      }
    }
    for (size_t j = 1; j < rounded.size(); ++j) {
      rounded[0] += rounded[j];
    }
    Number::write(
        out.data() + h * Number::kBytes, rounded.empty() ? 0 : rounded[0]);
  }
  return out;
}

Bytes expectedSums(const Sums& sums) {
  Bytes out;
  withNumber(sums.dtype, [&](auto number) {
    out = expectedSums<decltype(number)>(sums);
  });
  return out;
}

/// The public function, then each variant.
void expectSums(const Sums& sums) {
  const Bytes expected = expectedSums(sums);
  const auto rows = sums.rowData();
  Values out(expected.size());
  reduceRow(
      sums.dtype,
      out.data(),
      rows,
      sums.weightData(),
      sums.ends,
      sums.elements);
  ASSERT_TRUE(out.copy() == expected);
  if (rows.empty()) {
    return;
  }
  for (const ReduceVariant* variant : supportedReduceVariants()) {
    Values again(expected.size());
    variant->reduceRow(
        sums.dtype,
        again.data(),
        {rows.data(),
         sums.weightData(),
         rows.size(),
         sums.ends.data(),
         sums.ends.size()},
        sums.elements);
    ASSERT_TRUE(again.copy() == expected) << variant->name;
  }
}

/// One segment; one for each row; some of several rows, and empty ones.
std::vector<std::vector<uint32_t>> segmentsOf(uint32_t numRows) {
  std::vector<uint32_t> each;
  for (uint32_t i = 0; i < numRows; ++i) {
    each.push_back(i + 1);
  }
  const uint32_t third = numRows / 3;
  const uint32_t half = numRows / 2;
  return {
      {numRows},
      each,
      {0, numRows},
      {third, half, half, numRows},
      {0, 0, third, third, numRows, numRows}};
}

class ReduceRowTest : public testing::TestWithParam<DType> {};

TEST_P(ReduceRowTest, HasTheBitsOfTheReference) {
  std::mt19937 random(7);
  for (const size_t elements : kElements) {
    for (uint32_t numRows = 0; numRows < 10; ++numRows) {
      for (const bool weighted : {false, true}) {
        Sums sums = makeSums(random, GetParam(), elements, numRows, weighted);
        for (const auto& ends : segmentsOf(numRows)) {
          SCOPED_TRACE(concat(
              elements, " elements, ", numRows, " rows, weights ", weighted));
          sums.ends = ends;
          ASSERT_NO_FATAL_FAILURE(expectSums(sums));
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    DTypes, ReduceRowTest, testing::ValuesIn(kDTypes), [](const auto& info) {
      return std::string(nameOf(info.param));
    });

/// Rows of given values in one segment.
template <DType kDType>
Sums sumsOf(
    const std::vector<std::vector<typename Number<kDType>::Sum>>& rows,
    const std::vector<typename Number<kDType>::Sum>& weights = {}) {
  Sums sums{kDType, rows[0].size(), {}, {}, {}};
  for (const auto& row : rows) {
    Values& made = sums.rows.emplace_back(row.size() * Number<kDType>::kBytes);
    for (size_t h = 0; h < row.size(); ++h) {
      Number<kDType>::write(made.data() + h * Number<kDType>::kBytes, row[h]);
    }
  }
  if (!weights.empty()) {
    Values& made =
        sums.weights.emplace_back(weights.size() * sizeof(weights[0]));
    std::memcpy(made.data(), weights.data(), made.size());
  }
  sums.ends = {static_cast<uint32_t>(rows.size())};
  return sums;
}

/// The sum of rows of one element, by the reference and all variants.
template <DType kDType>
typename Number<kDType>::Sum sumOf(Sums sums) {
  expectSums(sums);
  return Number<kDType>::read(expectedSums(sums).data());
}

constexpr DType kBF16 = DType::kBFloat16;
constexpr DType kFP32 = DType::kFloat32;

TEST(ReduceRowOrderTest, GoesFromLeftToRight) {
  EXPECT_EQ(sumOf<kFP32>(sumsOf<kFP32>({{1}, {1e30F}, {-1e30F}})), 0);
  EXPECT_EQ(sumOf<kFP32>(sumsOf<kFP32>({{1e30F}, {-1e30F}, {1}})), 1);
}

TEST(ReduceRowOrderTest, RoundsProductsBeforeAddingThem) {
  const float near = 1 + 0x1p-12F;
  const float square = 1 + 0x1p-11F;  // without 2^-24, which a float drops
  EXPECT_EQ(sumOf<kFP32>(sumsOf<kFP32>({{square}, {near}}, {-1, near})), 0);
}

TEST(ReduceRowOrderTest, RoundsEverySegment) {
  Sums sums = sumsOf<kBF16>({{256}, {1}, {1}});
  EXPECT_EQ(sumOf<kBF16>(sums), 258);
  sums.ends = {2, 3};  // 257 is halfway between 256 and 258
  EXPECT_EQ(sumOf<kBF16>(sums), 256);
  sums.ends = {1, 3};
  EXPECT_EQ(sumOf<kBF16>(sums), 258);
}

TEST(ReduceRowOrderTest, BeginsWithTheFirstTermAndNotWithZero) {
  EXPECT_TRUE(std::signbit(sumOf<kBF16>(sumsOf<kBF16>({{-0.0F}}))));
  EXPECT_TRUE(
      std::signbit(sumOf<kFP32>(sumsOf<kFP32>({{-0.0F}, {1}}, {1, -0.0F}))));
}

/// Every value of a format in one row.
Values allValues() {
  Values values(size_t{65536} * 2);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    std::memcpy(values.data() + bits * 2, &bits, 2);
  }
  return values;
}

class RoundingTest : public testing::TestWithParam<DType> {
 protected:
  SmallFormat format() const {
    return GetParam() == kBF16 ? kBFloat16Format : kFloat16Format;
  }
};

TEST_P(RoundingTest, LeavesEveryValueButNaNsAsItIs) {
  Bytes expected = allValues().copy();
  const auto nan = static_cast<uint16_t>(
      format().infinity() | 1U << (format().mantissaBits - 1));
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    if ((bits & 0x7FFFU) > format().infinity()) {
      std::memcpy(expected.data() + size_t{bits} * 2, &nan, 2);
    }
  }
  const Sums sums{GetParam(), 65536, {allValues()}, {}, {1}};
  EXPECT_TRUE(expectedSums(sums) == expected);
  expectSums(sums);
}

TEST_P(RoundingTest, TakesTheEvenNeighbourOfTies) {
  // To each value a part of the way to the next one is added.
  Values steps(size_t{65536} * 2);
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float from = decode(format(), static_cast<uint16_t>(bits));
    const float to = decode(format(), static_cast<uint16_t>(bits + 1));
    const uint16_t step = encode(format(), to - from);
    std::memcpy(steps.data() + size_t{bits} * 2, &step, 2);
  }
  for (const float part : {0.5F, 0.5F + 0x1p-9F, 0.5F - 0x1p-9F, 0x1p-20F}) {
    Sums sums{GetParam(), 65536, {allValues(), steps}, {}, {2}};
    const float weights[] = {1, part};
    std::memcpy(
        sums.weights.emplace_back(sizeof(weights)).data(),
        weights,
        sizeof(weights));
    ASSERT_NO_FATAL_FAILURE(expectSums(sums));
  }
}

INSTANTIATE_TEST_SUITE_P(
    DTypes,
    RoundingTest,
    testing::Values(DType::kBFloat16, DType::kFloat16),
    [](const auto& info) { return std::string(nameOf(info.param)); });

TEST(RoundingTest, AgreesWithKnownValues) {
  EXPECT_EQ(encode(kBFloat16Format, 1 + 0x1p-8), 0x3F80);
  EXPECT_EQ(encode(kBFloat16Format, 1 + 0x3p-8), 0x3F82);
  EXPECT_EQ(encode(kBFloat16Format, -3.4e38), 0xFF80);
  EXPECT_EQ(encode(kFloat16Format, 65519.9), 0x7BFF);
  EXPECT_EQ(encode(kFloat16Format, 65520), 0x7C00);
  EXPECT_EQ(encode(kFloat16Format, 0x1p-25), 0);
  EXPECT_EQ(encode(kFloat16Format, -0x1.8p-25), 0x8001);
  EXPECT_EQ(decode(kFloat16Format, 0x3555), 0x1.554p-2F);
}

std::string errorOf(size_t numRows, const std::vector<uint32_t>& ends) {
  std::byte value[2] = {};
  const std::vector<const std::byte*> rows(numRows, value);
  std::byte out[2];
  try {
    reduceRow(kBF16, out, rows, nullptr, ends, 1);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TEST(ReduceRowErrorTest, NamesTheSegment) {
  EXPECT_EQ(
      errorOf(4, {1, 3, 2, 4}),
      "segmentEnds[2] is 2, expected at least 3 (the segment's begin) and at "
      "most 4 (the number of rows)");
  EXPECT_EQ(
      errorOf(1, {2}),
      "segmentEnds[0] is 2, expected at least 0 (the segment's begin) and at "
      "most 1 (the number of rows)");
  EXPECT_EQ(
      errorOf(3, {1, 2}),
      "segmentEnds ends with 2, expected 3 (the number of rows)");
  EXPECT_EQ(
      errorOf(1, {}),
      "segmentEnds ends with 0, expected 1 (the number of rows)");
}

TEST(ReduceVariantTest, NamesAreDifferentAndPlainIsAlwaysThere) {
  const auto variants = supportedReduceVariants();
  ASSERT_FALSE(variants.empty());
  EXPECT_STREQ(variants[0]->name, "plain");
  for (size_t i = 1; i < variants.size(); ++i) {
    EXPECT_STRNE(variants[i]->name, variants[i - 1]->name);
    EXPECT_NE(variants[i]->reduceRow, variants[i - 1]->reduceRow);
    EXPECT_NE(variants[i]->scaleAndDotRows, variants[i - 1]->scaleAndDotRows);
  }
}

}  // namespace
}  // namespace automoe::kernels
