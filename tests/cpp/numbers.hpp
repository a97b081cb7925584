// SPDX-License-Identifier: Apache-2.0
// Numbers of the kernels' types, decoded and rounded by another way than there.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels/dtype.hpp"

namespace automoe::kernels {

using Bytes = std::vector<std::byte>;

constexpr DType kDTypes[] = {
    DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
/// Row lengths around the sizes of registers and tiles.
constexpr size_t kElements[] = {
    1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1024, 1031};

/// A format of 16 bits.
struct SmallFormat {
  int exponentBits;
  int mantissaBits;

  int bias() const { return (1 << (exponentBits - 1)) - 1; }
  uint32_t infinity() const {
    return ((1U << exponentBits) - 1) << mantissaBits;
  }
};

constexpr SmallFormat kBFloat16Format = {8, 7};
constexpr SmallFormat kFloat16Format = {5, 10};

inline float decode(SmallFormat format, uint16_t bits) {
  const float sign = (bits & 0x8000U) != 0 ? -1.0F : 1.0F;
  const uint32_t magnitude = bits & 0x7FFFU;
  if (magnitude > format.infinity()) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  if (magnitude == format.infinity()) {
    return sign * std::numeric_limits<float>::infinity();
  }
  const int field = static_cast<int>(magnitude >> format.mantissaBits);
  const uint32_t one = 1U << format.mantissaBits;
  const uint32_t mantissa = (magnitude & (one - 1)) + (field == 0 ? 0 : one);
  const int exponent = std::max(field, 1) - format.bias();
  return sign *
         std::ldexp(
             static_cast<float>(mantissa), exponent - format.mantissaBits);
}

inline uint16_t encode(SmallFormat format, double value) {
  if (std::isnan(value)) {
    const uint32_t quiet = 1U << (format.mantissaBits - 1);
    return static_cast<uint16_t>(format.infinity() | quiet);
  }
  uint32_t magnitude = format.infinity();
  if (!std::isinf(value)) {
    const int smallest = 1 - format.bias();
    const int exponent =
        value == 0 ? smallest : std::max(std::ilogb(value), smallest);
    // To the nearest whole number, ties to even. Its leading one, or its
    // overflow into the next power of two, counts up the exponent's field.
    const auto steps = static_cast<uint32_t>(std::nearbyint(
        std::ldexp(std::fabs(value), format.mantissaBits - exponent)));
    const auto field = static_cast<uint32_t>(exponent - smallest);
    magnitude =
        std::min((field << format.mantissaBits) + steps, format.infinity());
  }
  return static_cast<uint16_t>(
      magnitude | (std::signbit(value) ? 0x8000U : 0U));
}

/// Values of a type, as they are summed.
template <DType kDType>
struct Number {
  static constexpr size_t kBytes = elementBytes(kDType);
  using Sum = std::conditional_t<kDType == DType::kFloat64, double, float>;

  static constexpr SmallFormat small() {
    return kDType == DType::kBFloat16 ? kBFloat16Format : kFloat16Format;
  }
  static Sum read(const std::byte* from) {
    if constexpr (kBytes == 2) {
      uint16_t bits;
      std::memcpy(&bits, from, kBytes);
      return decode(small(), bits);
    } else {
      Sum value;
      std::memcpy(&value, from, kBytes);
      return value;
    }
  }
  static void write(std::byte* to, Sum value) {
    if constexpr (kBytes == 2) {
      const uint16_t bits = encode(small(), value);
      std::memcpy(to, &bits, kBytes);
    } else {
      value = std::isnan(value) ? std::numeric_limits<Sum>::quiet_NaN() : value;
      std::memcpy(to, &value, kBytes);
    }
  }
  static Sum round(Sum value) {
    std::byte bytes[kBytes];
    write(bytes, value);
    return read(bytes);
  }
};

/// That of a type's weights and dot products.
template <class Number>
using NumberOfSum = std::conditional_t<
    sizeof(typename Number::Sum) == 8,
    kernels::Number<DType::kFloat64>,
    kernels::Number<DType::kFloat32>>;

template <class Call>
void withNumber(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat64:
      return call(Number<DType::kFloat64>{});
    case DType::kFloat32:
      return call(Number<DType::kFloat32>{});
    case DType::kBFloat16:
      return call(Number<DType::kBFloat16>{});
    case DType::kFloat16:
      return call(Number<DType::kFloat16>{});
  }
}

/// Memory that begins at an odd address and ends with its last value.
class Values {
 public:
  explicit Values(size_t bytes) : bytes_(bytes + 1) {}

  std::byte* data() { return bytes_.data() + 1; }
  const std::byte* data() const { return bytes_.data() + 1; }
  size_t size() const { return bytes_.size() - 1; }
  Bytes copy() const { return {data(), data() + size()}; }

 private:
  Bytes bytes_;
};

/// Sums of a few of these are mostly finite, with all kinds of values in them.
template <class Number>
void fill(std::mt19937& random, Values& values) {
  using Sum = typename Number::Sum;
  std::uniform_real_distribution<double> uniform(-2.0, 2.0);
  for (size_t at = 0; at < values.size(); at += Number::kBytes) {
    const uint32_t kind = random() % 64;
    if (kind == 0) {  // any bits: infinities, NaNs with payload, subnormals
      const uint64_t bits = (uint64_t{random()} << 32) | random();
      std::memcpy(values.data() + at, &bits, Number::kBytes);
    } else {
      const double scale = kind < 8 ? 1e-6 : 1;
      const double value = kind == 8 ? -0.0 : uniform(random) * scale;
      Number::write(values.data() + at, static_cast<Sum>(value));
    }
  }
  if (random() % 4 == 0) {  // an infinity or a NaN without payload
    const size_t at =
        random() % (values.size() / Number::kBytes) * Number::kBytes;
    const Sum infinity = std::numeric_limits<Sum>::infinity();
    Number::write(values.data() + at, random() % 2 == 0 ? infinity : -infinity);
  }
}

}  // namespace automoe::kernels
