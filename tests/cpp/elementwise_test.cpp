// SPDX-License-Identifier: Apache-2.0
// What collectives compute: every type and operation against one element at a
// time, computed here in another way.
#include "kernels/elementwise.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "numbers.hpp"

namespace automoe::kernels {
namespace {

constexpr ElementType kTypes[] = {
    ElementType::kBool,
    ElementType::kInt8,
    ElementType::kUInt8,
    ElementType::kInt16,
    ElementType::kUInt16,
    ElementType::kInt32,
    ElementType::kUInt32,
    ElementType::kInt64,
    ElementType::kUInt64,
    ElementType::kFloat16,
    ElementType::kBFloat16,
    ElementType::kFloat32,
    ElementType::kFloat64};
constexpr ReduceOperation kOperations[] = {
    ReduceOperation::kSum,
    ReduceOperation::kProduct,
    ReduceOperation::kMin,
    ReduceOperation::kMax,
    ReduceOperation::kBitAnd,
    ReduceOperation::kBitOr,
    ReduceOperation::kBitXor};

/// Of numbers, of which a minimum is not NaN: that is up to the caller.
template <class T>
T combined(ReduceOperation operation, T a, T b) {
  if (operation == ReduceOperation::kMin) {
    return a < b ? a : b;
  }
  if (operation == ReduceOperation::kMax) {
    return a > b ? a : b;
  }
  if constexpr (std::is_integral_v<T>) {
    // Modulo 2^64, and then cut to the type.
    const auto x = static_cast<uint64_t>(a);
    const auto y = static_cast<uint64_t>(b);
    switch (operation) {
      case ReduceOperation::kSum:
        return static_cast<T>(x + y);
      case ReduceOperation::kProduct:
        return static_cast<T>(x * y);
      case ReduceOperation::kBitAnd:
        return static_cast<T>(x & y);
      case ReduceOperation::kBitOr:
        return static_cast<T>(x | y);
      default:
        return static_cast<T>(x ^ y);
    }
  } else {
    return operation == ReduceOperation::kSum ? a + b : a * b;
  }
}

using Inputs = std::vector<const std::byte*>;

template <class T>
void expectInteger(
    ReduceOperation operation,
    const Inputs& at,
    uint32_t divisor,
    std::byte* to) {
  T result;
  std::memcpy(&result, at[0], sizeof(T));
  for (size_t i = 1; i < at.size(); ++i) {
    T next;
    std::memcpy(&next, at[i], sizeof(T));
    result = combined(operation, result, next);
  }
  const long double quotient =
      std::trunc(static_cast<long double>(result) / divisor);
  if (divisor != 1) {
    result = static_cast<T>(quotient);
  }
  std::memcpy(to, &result, sizeof(T));
}

template <DType kDType>
void expectFloat(
    ReduceOperation operation,
    const Inputs& at,
    uint32_t divisor,
    std::byte* to) {
  using Chosen = Number<kDType>;
  using Sum = typename Chosen::Sum;
  if (at.size() == 1 && divisor == 1) {
    std::memcpy(to, at[0], Chosen::kBytes);
    return;
  }
  Sum result = Chosen::read(at[0]);
  for (size_t i = 1; i < at.size(); ++i) {
    const Sum next = Chosen::read(at[i]);
    const bool hasNaN = std::isnan(result) || std::isnan(next);
    result = hasNaN ? std::numeric_limits<Sum>::quiet_NaN()
                    : combined(operation, result, next);
  }
  Chosen::write(to, result / static_cast<Sum>(divisor));
}

void expectBool(ReduceOperation operation, const Inputs& at, std::byte* to) {
  size_t count = 0;
  for (const std::byte* from : at) {
    count += *from != std::byte{0} ? 1 : 0;
  }
  bool result = count == at.size();
  if (operation == ReduceOperation::kBitXor) {
    result = count % 2 == 1;
  } else if (
      operation == ReduceOperation::kSum ||
      operation == ReduceOperation::kMax ||
      operation == ReduceOperation::kBitOr) {
    result = count > 0;
  }
  *to = std::byte{result ? uint8_t{1} : uint8_t{0}};
}

void expectElement(
    const Reduction& reduction, const Inputs& at, bool last, std::byte* to) {
  const ReduceOperation operation = reduction.operation;
  const bool divides = last && (operation == ReduceOperation::kSum);
  const uint32_t divisor = divides ? reduction.divisor : 1;
  switch (reduction.type) {
    case ElementType::kBool:
      return expectBool(operation, at, to);
    case ElementType::kInt8:
      return expectInteger<int8_t>(operation, at, divisor, to);
    case ElementType::kUInt8:
      return expectInteger<uint8_t>(operation, at, divisor, to);
    case ElementType::kInt16:
      return expectInteger<int16_t>(operation, at, divisor, to);
    case ElementType::kUInt16:
      return expectInteger<uint16_t>(operation, at, divisor, to);
    case ElementType::kInt32:
      return expectInteger<int32_t>(operation, at, divisor, to);
    case ElementType::kUInt32:
      return expectInteger<uint32_t>(operation, at, divisor, to);
    case ElementType::kInt64:
      return expectInteger<int64_t>(operation, at, divisor, to);
    case ElementType::kUInt64:
      return expectInteger<uint64_t>(operation, at, divisor, to);
    case ElementType::kFloat16:
      return expectFloat<DType::kFloat16>(operation, at, divisor, to);
    case ElementType::kBFloat16:
      return expectFloat<DType::kBFloat16>(operation, at, divisor, to);
    case ElementType::kFloat32:
      return expectFloat<DType::kFloat32>(operation, at, divisor, to);
    case ElementType::kFloat64:
      return expectFloat<DType::kFloat64>(operation, at, divisor, to);
  }
}

void fillElements(std::mt19937& random, ElementType type, Values& values) {
  switch (type) {
    case ElementType::kFloat16:
      return fill<Number<DType::kFloat16>>(random, values);
    case ElementType::kBFloat16:
      return fill<Number<DType::kBFloat16>>(random, values);
    case ElementType::kFloat32:
      return fill<Number<DType::kFloat32>>(random, values);
    case ElementType::kFloat64:
      return fill<Number<DType::kFloat64>>(random, values);
    default:
      break;
  }
  for (size_t i = 0; i < values.size(); ++i) {
    // Zeros for bool, and now and then the extremes of all integers.
    const uint32_t byte = random() % 4 == 0 ? 0 : random() & 0xFFU;
    values.data()[i] = std::byte{static_cast<uint8_t>(byte)};
  }
  const size_t size = elementBytes(type);
  std::byte* extreme = values.data() + random() % (values.size() / size) * size;
  std::memset(extreme, random() % 2 == 0 ? 0xFF : 0, size);
  extreme[size - 1] =
      std::byte{random() % 2 == 0 ? uint8_t{0x80} : uint8_t{0x7F}};
}

struct Case {
  Reduction reduction;
  size_t elements;
  size_t numInputs;
  bool last;

  std::string name() const {
    return std::string(nameOf(reduction.type)) + " " +
           nameOf(reduction.operation) + ", " + std::to_string(numInputs) +
           " inputs of " + std::to_string(elements) + ", divisor " +
           std::to_string(reduction.divisor) + (last ? ", last" : "");
  }
};

/// Writes to memory of its own, then into each input.
void expectReduced(std::mt19937& random, const Case& tried) {
  const size_t size = elementBytes(tried.reduction.type);
  std::vector<Values> inputs;
  Inputs data;
  for (size_t i = 0; i < tried.numInputs; ++i) {
    fillElements(
        random,
        tried.reduction.type,
        inputs.emplace_back(tried.elements * size));
  }
  for (const Values& values : inputs) {
    data.push_back(values.data());
  }
  Bytes expected(tried.elements * size);
  for (size_t at = 0; at < expected.size(); at += size) {
    Inputs elements;
    for (const std::byte* from : data) {
      elements.push_back(from + at);
    }
    expectElement(tried.reduction, elements, tried.last, expected.data() + at);
  }
  Values out(expected.size());
  reduceElements(
      tried.reduction, out.data(), data, expected.size(), tried.last);
  ASSERT_TRUE(out.copy() == expected) << tried.name();
  for (size_t i = 0; i < inputs.size(); ++i) {
    std::vector<Values> again = inputs;
    Inputs aliased;
    for (const Values& values : again) {
      aliased.push_back(values.data());
    }
    reduceElements(
        tried.reduction, again[i].data(), aliased, expected.size(), tried.last);
    ASSERT_TRUE(again[i].copy() == expected) << tried.name() << " in " << i;
    for (size_t j = 0; j < inputs.size(); ++j) {
      ASSERT_TRUE(j == i || again[j].copy() == inputs[j].copy());
    }
  }
}

class Elementwise : public testing::TestWithParam<ElementType> {};

TEST_P(Elementwise, ComputesEachElement) {
  std::mt19937 random(5);
  for (const ReduceOperation operation : kOperations) {
    if (!supports(GetParam(), operation)) {
      continue;
    }
    for (const size_t numInputs : {1, 2, 3, 8}) {
      // Around vectors, and around tiles of one and of eight bytes' elements.
      for (const size_t elements : {1, 3, 7, 17, 65, 513, 1031, 4099}) {
        const Reduction reduction{GetParam(), operation, 1};
        expectReduced(random, {reduction, elements, numInputs, true});
      }
    }
  }
}

TEST_P(Elementwise, DividesTheLastSumOnly) {
  std::mt19937 random(6);
  for (const uint32_t divisor : {2U, 3U, 8U, 1000U}) {
    for (const size_t numInputs : {1, 2, 5}) {
      for (const bool last : {false, true}) {
        const Reduction reduction{GetParam(), ReduceOperation::kSum, divisor};
        expectReduced(random, {reduction, 1031, numInputs, last});
      }
    }
  }
}

TEST_P(Elementwise, TakesNothing) {
  const Inputs nothing = {nullptr, nullptr};
  for (const ReduceOperation operation : kOperations) {
    if (supports(GetParam(), operation)) {
      reduceElements({GetParam(), operation, 3}, nullptr, nothing, 0, true);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Types, Elementwise, testing::ValuesIn(kTypes), [](const auto& each) {
      return nameOf(each.param);
    });

template <class T>
T reduced(const Reduction& reduction, const std::vector<T>& values) {
  Inputs inputs;
  for (const T& value : values) {
    inputs.push_back(reinterpret_cast<const std::byte*>(&value));
  }
  T result;
  reduceElements(
      reduction,
      reinterpret_cast<std::byte*>(&result),
      inputs,
      sizeof(T),
      true);
  return result;
}

constexpr auto kSum = ReduceOperation::kSum;

TEST(ElementwiseValues, IntegersWrapAround) {
  EXPECT_EQ(reduced<int8_t>({ElementType::kInt8, kSum}, {127, 1}), -128);
  EXPECT_EQ(reduced<uint8_t>({ElementType::kUInt8, kSum}, {200, 100}), 44);
  const Reduction product{ElementType::kUInt16, ReduceOperation::kProduct};
  EXPECT_EQ(reduced<uint16_t>(product, {65535, 65535}), 1);
  const int64_t most = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(reduced<int64_t>({ElementType::kInt64, kSum}, {most, most, 1}), -1);
}

TEST(ElementwiseValues, MinimaKnowTheSign) {
  const auto least = ReduceOperation::kMin;
  EXPECT_EQ(reduced<int8_t>({ElementType::kInt8, least}, {-1, 1}), -1);
  EXPECT_EQ(reduced<uint8_t>({ElementType::kUInt8, least}, {255, 1}), 1);
  const uint64_t large = uint64_t{1} << 63;
  EXPECT_EQ(reduced<uint64_t>({ElementType::kUInt64, least}, {large, 1}), 1);
}

TEST(ElementwiseValues, AveragesOfIntegersRoundTowardZero) {
  const Reduction average{ElementType::kInt32, kSum, 2};
  EXPECT_EQ(reduced<int32_t>(average, {-4, -3}), -3);
  EXPECT_EQ(reduced<int32_t>(average, {4, 3}), 3);
  const Reduction huge{ElementType::kInt32, kSum, 0x80000000U};
  EXPECT_EQ(
      reduced<int32_t>(huge, {std::numeric_limits<int32_t>::min(), 0}), -1);
  const Reduction large{ElementType::kUInt8, kSum, 256};
  EXPECT_EQ(reduced<uint8_t>(large, {200, 10}), 0);
}

TEST(ElementwiseValues, AnyByteIsTrue) {
  const auto tried = [](ReduceOperation operation) {
    const Reduction reduction{ElementType::kBool, operation, 1};
    return reduced<uint8_t>(reduction, {2, 4});
  };
  for (const ReduceOperation operation : kOperations) {
    const bool isXor = operation == ReduceOperation::kBitXor;
    EXPECT_EQ(tried(operation), isXor ? 0 : 1) << nameOf(operation);
  }
  EXPECT_EQ(reduced<uint8_t>({ElementType::kBool, kSum}, {0x80}), 1);
  EXPECT_EQ(reduced<uint8_t>({ElementType::kBool, kSum, 2}, {1, 1}), 1);
}

TEST(ElementwiseValues, NaNWinsFromEveryPlace) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto operation : {ReduceOperation::kMin, ReduceOperation::kMax}) {
    for (size_t i = 0; i < 4; ++i) {
      std::vector<float> values(4, 1.0F);
      values[i] = -nan;
      const float result =
          reduced<float>({ElementType::kFloat32, operation}, values);
      uint32_t bits;
      std::memcpy(&bits, &result, sizeof(bits));
      EXPECT_EQ(bits, 0x7FC00000U);
    }
  }
}

TEST(ElementwiseValues, HalvesAreRoundedOnce) {
  // 256 + 1 is 256 in bfloat16, but 256 + 1 + 1 is 258.
  const Reduction sum{ElementType::kBFloat16, kSum};
  EXPECT_EQ(reduced<uint16_t>(sum, {0x4380, 0x3F80, 0x3F80}), 0x4381);
  // 65504 + 65504 has no float16, but half of it has.
  const Reduction average{ElementType::kFloat16, kSum, 2};
  EXPECT_EQ(reduced<uint16_t>(average, {0x7BFF, 0x7BFF}), 0x7BFF);
}

TEST(ElementwiseValues, HaveNamesAndSizes) {
  EXPECT_STREQ(nameOf(ElementType::kBool), "bool");
  EXPECT_STREQ(nameOf(ElementType::kUInt64), "uint64");
  EXPECT_STREQ(nameOf(ElementType::kBFloat16), "bfloat16");
  EXPECT_STREQ(nameOf(ElementType::kFloat64), "float64");
  EXPECT_STREQ(nameOf(ReduceOperation::kSum), "SUM");
  EXPECT_STREQ(nameOf(ReduceOperation::kBitXor), "BXOR");
  EXPECT_EQ(elementBytes(ElementType::kBool), 1);
  EXPECT_EQ(elementBytes(ElementType::kInt16), 2);
  EXPECT_EQ(elementBytes(ElementType::kFloat16), 2);
  EXPECT_EQ(elementBytes(ElementType::kFloat32), 4);
  EXPECT_EQ(elementBytes(ElementType::kUInt64), 8);
}

TEST(ElementwiseValues, FloatsHaveNoBits) {
  for (const ElementType type : kTypes) {
    const bool isFloat = std::string(nameOf(type)).find("float") == 0 ||
                         type == ElementType::kBFloat16;
    for (const ReduceOperation operation : kOperations) {
      const bool isBitwise = operation >= ReduceOperation::kBitAnd;
      EXPECT_EQ(supports(type, operation), !(isFloat && isBitwise))
          << nameOf(type) << " " << nameOf(operation);
    }
  }
}

}  // namespace
}  // namespace automoe::kernels
