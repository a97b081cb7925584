// SPDX-License-Identifier: Apache-2.0
// The arithmetic of one element, the same for a CPU and a CUDA thread. Compile
// users of it without contraction of products and sums (-ffp-contract=off).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

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
  double nan;
  std::memcpy(&nan, &kDoubleNaN, sizeof(nan));
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

/// Element i of a row belongs to lane i % kDotLanes of its dot product. Lanes
/// begin with zero and take their elements in order; then lane l takes lane
/// l + n/2 for all l < n/2, while n, the number of lanes, is halved to 1.
template <DType kDType>
constexpr size_t kDotLanes = 256 / sizeof(typename Format<kDType>::Sum);

}  // namespace automoe::kernels
