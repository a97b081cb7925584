// SPDX-License-Identifier: Apache-2.0
// The arithmetic of one element, the same for a CPU and a CUDA thread. Compile
// users of it without contraction of products and sums (-ffp-contract=off).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/dtype.hpp"

#ifdef __FAST_MATH__
#error "-ffast-math reorders sums and drops NaNs: their bits are promised"
#endif

#ifdef __CUDACC__
#define AUTOMOE_HOST_DEVICE __host__ __device__
#else
#define AUTOMOE_HOST_DEVICE
#endif

namespace automoe::kernels {

// Processors disagree on the sign and payload of the NaN that an operation
// makes or passes on. Hence every NaN that is written is one of these.
constexpr uint32_t kFloatNaN = 0x7FC00000U;
constexpr uint16_t kBFloat16NaN = 0x7FC0U;
constexpr uint16_t kFloat16NaN = 0x7E00U;
constexpr uint64_t kDoubleNaN = 0x7FF8000000000000U;

AUTOMOE_HOST_DEVICE inline uint32_t floatBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

AUTOMOE_HOST_DEVICE inline float floatOf(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

AUTOMOE_HOST_DEVICE inline float bfloat16ToFloat(uint16_t bits) {
  return floatOf(static_cast<uint32_t>(bits) << 16);
}

/// To the nearest, ties to even; the NaN is that of c10::BFloat16.
AUTOMOE_HOST_DEVICE inline uint16_t floatToBFloat16(float value) {
  const uint32_t bits = floatBits(value);
  const uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : kBFloat16NaN);
}

AUTOMOE_HOST_DEVICE inline float float16ToFloat(uint16_t bits) {
  // 112 is the difference of the exponents' biases. Each of the three cases is
  // computed and one is taken, so that a loop over this has no branch.
  constexpr uint32_t kRebias = 112U << 23;
  constexpr uint32_t kSmallest = 113U << 23;  // 2^-14
  const uint32_t magnitude = (bits & 0x7FFFU) << 13;
  const uint32_t subnormal =
      floatBits(floatOf(magnitude + kSmallest) - floatOf(kSmallest));
  const uint32_t exponent = bits & 0x7C00U;
  const uint32_t finite = exponent == 0 ? subnormal : magnitude + kRebias;
  const uint32_t all = exponent == 0x7C00U ? magnitude + 2 * kRebias : finite;
  return floatOf((static_cast<uint32_t>(bits & 0x8000U) << 16) | all);
}

/// To the nearest, ties to even, as c10::Half but for the sign of a NaN.
AUTOMOE_HOST_DEVICE inline uint16_t floatToFloat16(float value) {
  constexpr uint32_t kOverflow = 143U << 23;  // 2^16
  constexpr uint32_t kSmallest = 113U << 23;  // 2^-14
  constexpr uint32_t kHalf = 126U << 23;  // 0.5: its last bit is worth 2^-24
  const uint32_t bits = floatBits(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  const uint32_t normal =
      (magnitude - (112U << 23) + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
  const uint32_t subnormal =
      floatBits(floatOf(magnitude) + floatOf(kHalf)) - kHalf;
  const uint32_t finite = magnitude < kSmallest ? subnormal : normal;
  const uint32_t all = magnitude >= kOverflow ? 0x7C00U : finite;
  const uint32_t isSigned = ((bits >> 16) & 0x8000U) | all;
  return static_cast<uint16_t>(value == value ? isSigned : kFloat16NaN);
}

AUTOMOE_HOST_DEVICE inline float withOneNaN(float value) {
  return value == value ? value : floatOf(kFloatNaN);
}

AUTOMOE_HOST_DEVICE inline double withOneNaN(double value) {
  const uint64_t bits = kDoubleNaN;  // has an address in device code too
  double nan;
  std::memcpy(&nan, &bits, sizeof(nan));
  return value == value ? value : nan;
}

/// How values of a type are stored, and what they are summed in.
template <DType>
struct Format;

template <>
struct Format<DType::kFloat64> {
  using Stored = double;
  using Sum = double;
  AUTOMOE_HOST_DEVICE static Sum widen(Stored value) { return value; }
  AUTOMOE_HOST_DEVICE static Stored round(Sum value) {
    return withOneNaN(value);
  }
};

template <>
struct Format<DType::kFloat32> {
  using Stored = float;
  using Sum = float;
  AUTOMOE_HOST_DEVICE static Sum widen(Stored value) { return value; }
  AUTOMOE_HOST_DEVICE static Stored round(Sum value) {
    return withOneNaN(value);
  }
};

template <>
struct Format<DType::kBFloat16> {
  using Stored = uint16_t;
  using Sum = float;
  AUTOMOE_HOST_DEVICE static Sum widen(Stored bits) {
    return bfloat16ToFloat(bits);
  }
  AUTOMOE_HOST_DEVICE static Stored round(Sum value) {
    return floatToBFloat16(value);
  }
};

template <>
struct Format<DType::kFloat16> {
  using Stored = uint16_t;
  using Sum = float;
  AUTOMOE_HOST_DEVICE static Sum widen(Stored bits) {
    return float16ToFloat(bits);
  }
  AUTOMOE_HOST_DEVICE static Stored round(Sum value) {
    return floatToFloat16(value);
  }
};

/// Calls call(dtype), the type as a std::integral_constant.
template <class Call>
void withDType(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat64:
      return call(std::integral_constant<DType, DType::kFloat64>{});
    case DType::kFloat32:
      return call(std::integral_constant<DType, DType::kFloat32>{});
    case DType::kBFloat16:
      return call(std::integral_constant<DType, DType::kBFloat16>{});
    case DType::kFloat16:
      return call(std::integral_constant<DType, DType::kFloat16>{});
  }
}

/// Element i of a row belongs to lane i % kDotLanes of its dot product. Lanes
/// begin with zero and take their elements in order; then lane l takes lane
/// l + n/2 for all l < n/2, while n, the number of lanes, is halved to 1.
template <DType kDType>
constexpr size_t kDotLanes = 256 / sizeof(typename Format<kDType>::Sum);

/// One step of a row's probe (rows.hpp). An odd multiplier loses nothing; its
/// upper bits carry what the shift then brings to the lower ones.
AUTOMOE_HOST_DEVICE inline uint64_t mixProbe(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9E3779B97F4A7C15U;
  return hash ^ (hash >> 32);
}

/// So many words of 8 bytes are probed, from the row's first to its last; a row
/// of less than one word is one, filled up with zeros.
AUTOMOE_HOST_DEVICE inline size_t probeWords(size_t rowBytes) {
  constexpr size_t kMost = 8;
  const size_t words = (rowBytes + 7) / 8;
  return words < kMost ? words : kMost;
}

AUTOMOE_HOST_DEVICE inline size_t probeWordAt(
    size_t rowBytes, size_t words, size_t i) {
  return words <= 1 ? 0 : i * (rowBytes - 8) / (words - 1);
}

// Floats of 8 bits with 4 of exponent and 3 of mantissa (E4M3 "FN": no
// infinity, one NaN of either sign).
constexpr uint8_t kFloat8NaN = 0x7FU;
constexpr uint8_t kFloat8Largest = 0x7EU;
constexpr float kFloat8Most = 448.0F;

/// To the nearest, ties to even; finite values saturate at 448, infinities are
/// NaN as NaN is, so that an overflow upstream shows.
AUTOMOE_HOST_DEVICE inline uint8_t floatToFloat8E4M3(float value) {
  constexpr uint32_t kInfinity = 0x7F800000U;
  constexpr uint32_t kSmallest = 121U << 23;  // 2^-6
  constexpr uint32_t kShifter = 141U << 23;  // 2^14: its last bit is worth 2^-9
  const uint32_t bits = floatBits(value);
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  const uint32_t normal =
      (magnitude - (120U << 23) + 0x7FFFFU + ((magnitude >> 20) & 1U)) >> 20;
  // Only of what is small, as the sum of large ones would leave the format.
  const uint32_t subnormal =
      floatBits(floatOf(magnitude) + floatOf(kShifter)) - kShifter;
  const uint32_t rounded = magnitude < kSmallest ? subnormal : normal;
  const uint32_t finite = rounded < kFloat8Largest ? rounded : kFloat8Largest;
  const uint32_t isSigned = ((bits >> 24) & 0x80U) | finite;
  return static_cast<uint8_t>(magnitude < kInfinity ? isSigned : kFloat8NaN);
}

AUTOMOE_HOST_DEVICE inline float float8E4M3ToFloat(uint8_t bits) {
  constexpr uint32_t kRebias = 120U << 23;
  const uint32_t magnitude = bits & 0x7FU;
  const float steps = static_cast<float>(magnitude) * floatOf(118U << 23);
  const uint32_t finite =
      magnitude < 8U ? floatBits(steps) : (magnitude << 20) + kRebias;
  const uint32_t all = magnitude == kFloat8NaN ? kFloatNaN : finite;
  const uint32_t sign = magnitude == kFloat8NaN ? 0U : (bits & 0x80U);
  return floatOf((sign << 24) | all);
}

/// So many neighbouring elements of a row share a scale.
constexpr size_t kScaleElements = 128;

AUTOMOE_HOST_DEVICE constexpr size_t scalesOf(size_t elements) {
  return (elements + kScaleElements - 1) / kScaleElements;
}

/// What the largest finite magnitude of a block takes to 448; at least the
/// smallest normal number, so that its inverse is finite. A block of zeros has
/// the scale 1.
AUTOMOE_HOST_DEVICE inline float scaleFor(float largest) {
  constexpr uint32_t kSmallestNormal = 1U << 23;
  const float scale = largest / kFloat8Most;
  const float least = floatOf(kSmallestNormal);
  const float some = scale < least ? least : scale;
  return largest == 0 ? 1.0F : some;
}

/// The larger of `largest` and |value|, unless that is not finite.
AUTOMOE_HOST_DEVICE inline float largerFinite(float largest, float value) {
  const float magnitude = floatOf(floatBits(value) & 0x7FFFFFFFU);
  const bool isFinite = floatBits(magnitude) < 0x7F800000U;
  return isFinite && magnitude > largest ? magnitude : largest;
}

}  // namespace automoe::kernels
