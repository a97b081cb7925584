// SPDX-License-Identifier: Apache-2.0
// Rows of 8-bit floats: each value against a table of all of them, the CPU's
// blocks against sums in double, the emulated kernels against the CPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device_memory.hpp"
#include "cuda/emulated_cuda.hpp"
#include "kernels/device_kernels.hpp"
#include "kernels/quantize.hpp"
#include "kernels/row_math.hpp"
#include "process_group/common/error.hpp"

namespace automoe::kernels {
namespace {

constexpr int kMaxBlocks[] = {0, 1, 3};
constexpr DType kQuantizable[] = {
    DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr size_t kLengths[] = {
    1, 7, 8, 16, 100, 127, 128, 129, 256, 384, 520, 1031};

/// The finite values without sign, by their bits: 0 to 448.
std::vector<double> makeTable() {
  std::vector<double> table;
  for (int bits = 0; bits < 0x7F; ++bits) {
    const int field = bits / 8;
    const int mantissa = bits % 8 + (field == 0 ? 0 : 8);
    table.push_back(std::ldexp(mantissa, std::max(field, 1) - 7 - 3));
  }
  return table;
}

const std::vector<double>& table() {
  static const std::vector<double> made = makeTable();
  return made;
}

/// By search for the nearest value.
uint8_t nearest(float value) {
  if (!std::isfinite(value)) {
    return 0x7F;
  }
  const double magnitude = std::fabs(static_cast<double>(value));
  const auto above =
      std::lower_bound(table().begin(), table().end(), magnitude);
  auto code = static_cast<size_t>(above - table().begin());
  if (code == table().size()) {
    code -= 1;
  } else if (code > 0) {
    const double up = *above - magnitude;
    const double down = magnitude - *(above - 1);
    if (down < up || (down == up && code % 2 == 1)) {
      code -= 1;
    }
  }
  return static_cast<uint8_t>(code | (std::signbit(value) ? 0x80U : 0U));
}

TEST(Float8Test, IsTheNearestOfAllValues) {
  for (uint32_t upper = 0; upper < 0x10000; ++upper) {
    for (const uint32_t lower : {0U, 1U, 0x7FFFU, 0x8000U, 0x8001U, 0xFFFFU}) {
      const float value = floatOf(upper << 16 | lower);
      ASSERT_EQ(floatToFloat8E4M3(value), nearest(value)) << value;
    }
  }
}

TEST(Float8Test, TiesGoToTheEvenOne) {
  for (size_t code = 0; code + 1 < table().size(); ++code) {
    const auto middle =
        static_cast<float>((table()[code] + table()[code + 1]) / 2);
    const float infinity = std::numeric_limits<float>::infinity();
    EXPECT_EQ(floatToFloat8E4M3(middle), code + code % 2);
    EXPECT_EQ(floatToFloat8E4M3(std::nextafter(middle, 0.0F)), code);
    EXPECT_EQ(floatToFloat8E4M3(std::nextafter(middle, infinity)), code + 1);
  }
}

TEST(Float8Test, BecomesTheFloatItStandsFor) {
  for (uint32_t bits = 0; bits < 256; ++bits) {
    const float value = float8E4M3ToFloat(static_cast<uint8_t>(bits));
    if ((bits & 0x7FU) == 0x7FU) {
      EXPECT_EQ(floatBits(value), kFloatNaN);
    } else {
      EXPECT_EQ(std::fabs(value), table()[bits & 0x7FU]);
      EXPECT_EQ(std::signbit(value), bits >= 0x80);
      EXPECT_EQ(floatToFloat8E4M3(value), bits);
    }
  }
}

/// Rows in the 8-bit form.
struct Quantized {
  std::vector<uint8_t> values;
  std::vector<float> scales;

  bool operator==(const Quantized&) const = default;
};

template <class Number>
Quantized expectQuantized(const Bytes& row, size_t elements) {
  Quantized result;
  for (size_t begin = 0; begin < elements; begin += 128) {
    const size_t end = std::min(elements, begin + 128);
    std::vector<float> block;
    double largest = 0;
    for (size_t i = begin; i < end; ++i) {
      block.push_back(Number::read(row.data() + i * Number::kBytes));
      if (std::isfinite(block.back())) {
        largest = std::max(largest, std::fabs(double{block.back()}));
      }
    }
    const float scale = std::max(
        static_cast<float>(largest / 448), std::numeric_limits<float>::min());
    result.scales.push_back(largest == 0 ? 1 : scale);
    const auto inverse = static_cast<float>(1 / double{result.scales.back()});
    for (const float value : block) {
      result.values.push_back(
          nearest(static_cast<float>(double{value} * double{inverse})));
    }
  }
  return result;
}

Quantized quantized(DType dtype, const Bytes& row, size_t elements) {
  Quantized result{
      std::vector<uint8_t>(elements), std::vector<float>(scalesOf(elements))};
  quantizeRow(
      dtype, result.values.data(), result.scales.data(), row.data(), elements);
  return result;
}

/// With blocks of zeros, of subnormals, of huge values, and some of all kinds.
Bytes randomRow(std::mt19937& random, DType dtype, size_t elements) {
  Bytes row = randomValues(random, dtype, elements);
  withNumber(dtype, [&](auto number) {
    using Chosen = decltype(number);
    using Sum = typename Chosen::Sum;
    for (size_t begin = 0; begin < elements; begin += 128) {
      const uint32_t kind = random() % 8;
      if (kind > 3) {
        continue;
      }
      constexpr double kFactors[] = {0, 1e-40, 1e30, 1e-4};
      const size_t end = std::min(elements, begin + 128);
      for (size_t i = begin; i < end; ++i) {
        std::byte* const at = row.data() + i * Chosen::kBytes;
        const double value = static_cast<double>(Chosen::read(at));
        const double factor = kFactors[kind];
        Chosen::write(
            at,
            static_cast<Sum>(std::isfinite(value) ? value * factor : factor));
      }
    }
  });
  return row;
}

class QuantizeTest : public testing::TestWithParam<DType> {};

TEST_P(QuantizeTest, HasTheValuesAndScalesOfTheReference) {
  std::mt19937 random(1);
  for (int round = 0; round < 20; ++round) {
    for (const size_t elements : kLengths) {
      const Bytes row = randomRow(random, GetParam(), elements);
      Quantized expected;
      withNumber(GetParam(), [&](auto number) {
        if constexpr (sizeof(typename decltype(number)::Sum) == 4) {
          expected = expectQuantized<decltype(number)>(row, elements);
        }
      });
      ASSERT_TRUE(quantized(GetParam(), row, elements) == expected) << elements;
    }
  }
}

TEST_P(QuantizeTest, ComesBackWithinHalfAStep) {
  std::mt19937 random(2);
  withNumber(GetParam(), [&](auto number) {
    using Chosen = decltype(number);
    const size_t elements = 1031;
    Values row(elements * Chosen::kBytes);
    fill<Chosen>(random, row);
    const Quantized of = quantized(GetParam(), row.copy(), elements);
    Bytes back(row.size());
    dequantizeRow(
        GetParam(), back.data(), of.values.data(), of.scales.data(), elements);
    for (size_t i = 0; i < elements; ++i) {
      const double before = Chosen::read(row.data() + i * Chosen::kBytes);
      const double after = Chosen::read(back.data() + i * Chosen::kBytes);
      const double scale = double{of.scales[i / 128]};
      ASSERT_EQ(std::isfinite(before), !std::isnan(after)) << before;
      if (std::isfinite(before)) {
        // 3 bits of mantissa, or steps of 2^-9 where it is subnormal; and a
        // little for the roundings of the scale and of the result.
        const double bound = std::max(
            std::fabs(before) * std::ldexp(1.02, -4),
            scale * std::ldexp(1.02, -10));
        ASSERT_LE(std::fabs(after - before), bound) << before;
      }
    }
  });
}

/// Rows of one call, by the CPU.
Quantized expectRows(DType dtype, const Bytes& rows, size_t elements) {
  const size_t rowBytes = elements * elementBytes(dtype);
  Quantized all;
  for (size_t at = 0; at < rows.size(); at += rowBytes) {
    const auto from = rows.begin() + static_cast<ptrdiff_t>(at);
    const Quantized row = quantized(
        dtype, Bytes(from, from + static_cast<ptrdiff_t>(rowBytes)), elements);
    all.values.insert(all.values.end(), row.values.begin(), row.values.end());
    all.scales.insert(all.scales.end(), row.scales.begin(), row.scales.end());
  }
  return all;
}

Bytes bytesOf(const std::vector<uint8_t>& values) {
  Bytes bytes(values.size());
  std::transform(
      values.begin(), values.end(), bytes.begin(), [](uint8_t value) {
        return std::byte{value};
      });
  return bytes;
}

/// What the kernel makes of these rows, or of those of an index.
void expectQuantized(
    DType dtype,
    Memory& rows,
    size_t elements,
    size_t count,
    const int32_t* index,
    const Quantized& expected,
    std::mt19937& random) {
  Memory values(count * elements, oneOf(random, kOffsets));
  std::vector<float> scales(expected.scales.size(), -7.0F);
  QuantizeRows call;
  call.dtype = dtype;
  call.rows = rows.data();
  call.index = index;
  call.values = reinterpret_cast<uint8_t*>(values.data());
  call.scales = scales.data();
  call.count = count;
  call.elements = elements;
  call.maxBlocks = oneOf(random, kMaxBlocks);
  emulated::setSeed(random());
  enqueue(call, nullptr);
  ASSERT_TRUE(values.copy() == bytesOf(expected.values)) << elements;
  ASSERT_EQ(scales, expected.scales) << elements;
  ASSERT_TRUE(values.isIntact());
}

TEST_P(QuantizeTest, KernelHasTheBitsOfTheCpu) {
  std::mt19937 random(3);
  for (int round = 0; round < 80; ++round) {
    const size_t elements = oneOf(random, kLengths);
    const size_t count = random() % 6;
    Bytes all;
    for (size_t i = 0; i < count; ++i) {
      const Bytes row = randomRow(random, GetParam(), elements);
      all.insert(all.end(), row.begin(), row.end());
    }
    const Quantized expected = expectRows(GetParam(), all, elements);
    Memory rows(all, oneOf(random, kOffsets));
    expectQuantized(
        GetParam(), rows, elements, count, nullptr, expected, random);
  }
}

// Out of order, repeated, some never, some negative: those are rows of zeros.
TEST_P(QuantizeTest, KernelTakesTheRowsOfAnIndex) {
  std::mt19937 random(5);
  for (int round = 0; round < 120; ++round) {
    const size_t elements = oneOf(random, kLengths);
    const size_t rowBytes = elements * elementBytes(GetParam());
    const size_t sources = random() % 5;
    Bytes all;
    for (size_t i = 0; i < sources; ++i) {
      const Bytes row = randomRow(random, GetParam(), elements);
      all.insert(all.end(), row.begin(), row.end());
    }
    std::vector<int32_t> index(random() % 9);
    Bytes taken;
    for (int32_t& from : index) {
      from = static_cast<int32_t>(random() % (sources + 1)) - 1;
      const auto at =
          all.begin() + std::max(from, 0) * static_cast<ptrdiff_t>(rowBytes);
      const Bytes row = from < 0
                            ? Bytes(rowBytes)
                            : Bytes(at, at + static_cast<ptrdiff_t>(rowBytes));
      taken.insert(taken.end(), row.begin(), row.end());
    }
    const Quantized expected = expectRows(GetParam(), taken, elements);
    Memory rows(all, oneOf(random, kOffsets));
    expectQuantized(
        GetParam(),
        rows,
        elements,
        index.size(),
        index.data(),
        expected,
        random);
  }
}

TEST_P(QuantizeTest, KernelComesBackWithTheBitsOfTheCpu) {
  std::mt19937 random(4);
  constexpr DType kScaleType = DType::kFloat32;
  for (int round = 0; round < 80; ++round) {
    const size_t elements = oneOf(random, kLengths);
    const size_t count = random() % 6;
    const size_t rowBytes = elements * elementBytes(GetParam());
    Memory values(randomBytes(random, count * elements), random() % 9);
    const size_t blocks = count * scalesOf(elements);
    Memory scales(randomValues(random, kScaleType, blocks), 0);
    auto* const codes = reinterpret_cast<uint8_t*>(values.data());
    auto* const factors = reinterpret_cast<float*>(scales.data());
    Bytes expected(count * rowBytes);
    for (size_t row = 0; row < count; ++row) {
      dequantizeRow(
          GetParam(),
          expected.data() + row * rowBytes,
          codes + row * elements,
          factors + row * scalesOf(elements),
          elements);
    }
    Memory rows(count * rowBytes, oneOf(random, kOffsets));
    DequantizeRows call;
    call.dtype = GetParam();
    call.rows = rows.data();
    call.values = codes;
    call.scales = factors;
    call.count = count;
    call.elements = elements;
    call.maxBlocks = oneOf(random, kMaxBlocks);
    emulated::setSeed(random());
    enqueue(call, nullptr);
    ASSERT_TRUE(rows.copy() == expected) << elements;
    ASSERT_TRUE(rows.isIntact());
  }
}

INSTANTIATE_TEST_SUITE_P(
    DTypes,
    QuantizeTest,
    testing::ValuesIn(kQuantizable),
    [](const auto& info) { return std::string(nameOf(info.param)); });

TEST(QuantizeTest, RefusesDoubles) {
  QuantizeRows call;
  call.dtype = DType::kFloat64;
  EXPECT_THROW(enqueue(call, nullptr), std::invalid_argument);
  DequantizeRows back;
  back.dtype = DType::kFloat64;
  EXPECT_THROW(enqueue(back, nullptr), std::invalid_argument);
  EXPECT_THROW(
      quantizeRow(DType::kFloat64, nullptr, nullptr, nullptr, 0),
      std::invalid_argument);
}

}  // namespace
}  // namespace automoe::kernels
