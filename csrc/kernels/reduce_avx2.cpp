// SPDX-License-Identifier: Apache-2.0
// The sums for AVX2 and F16C. Not for FMA: a fused product is not rounded.
#ifdef __x86_64__
#include <immintrin.h>

#define AUTOMOE_TARGET __attribute__((target("avx2,f16c")))
#include "kernels/row_sums.hpp"

namespace automoe::kernels {
namespace {

AUTOMOE_ROW_FUNCTION __m256 oneNaN(__m256 value) {
  const __m256 isNaN = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  return _mm256_blendv_ps(value, _mm256_set1_ps(floatOf(kFloatNaN)), isNaN);
}

template <DType>
struct Avx2Lanes;

template <>
struct Avx2Lanes<DType::kFloat64> : Format<DType::kFloat64> {
  using Register = __m256d;
  static constexpr DType kDType = DType::kFloat64;
  static constexpr size_t kLanes = 4;
  static constexpr size_t kTileParts = 8;

  AUTOMOE_ROW_FUNCTION static Register spread(double value) {
    return _mm256_set1_pd(value);
  }
  AUTOMOE_ROW_FUNCTION static Register add(Register a, Register b) {
    return _mm256_add_pd(a, b);
  }
  AUTOMOE_ROW_FUNCTION static Register multiply(Register a, Register b) {
    return _mm256_mul_pd(a, b);
  }
  AUTOMOE_ROW_FUNCTION static Register load(const std::byte* from) {
    return _mm256_loadu_pd(reinterpret_cast<const double*>(from));
  }
  AUTOMOE_ROW_FUNCTION static Register rounded(Register value) { return value; }
  AUTOMOE_ROW_FUNCTION static void store(std::byte* to, Register value) {
    double nan;
    std::memcpy(&nan, &kDoubleNaN, sizeof(nan));
    const Register isNaN = _mm256_cmp_pd(value, value, _CMP_UNORD_Q);
    _mm256_storeu_pd(
        reinterpret_cast<double*>(to),
        _mm256_blendv_pd(value, _mm256_set1_pd(nan), isNaN));
  }
  AUTOMOE_ROW_FUNCTION static void storeSums(double* to, Register value) {
    _mm256_storeu_pd(to, value);
  }
};

/// What the types that are summed in eight floats share.
struct FloatLanes {
  using Register = __m256;
  static constexpr size_t kLanes = 8;
  static constexpr size_t kTileParts = 8;

  AUTOMOE_ROW_FUNCTION static Register spread(float value) {
    return _mm256_set1_ps(value);
  }
  AUTOMOE_ROW_FUNCTION static Register add(Register a, Register b) {
    return _mm256_add_ps(a, b);
  }
  AUTOMOE_ROW_FUNCTION static Register multiply(Register a, Register b) {
    return _mm256_mul_ps(a, b);
  }
  AUTOMOE_ROW_FUNCTION static void storeSums(float* to, Register value) {
    _mm256_storeu_ps(to, value);
  }
};

template <>
struct Avx2Lanes<DType::kFloat32> : Format<DType::kFloat32>, FloatLanes {
  static constexpr DType kDType = DType::kFloat32;

  AUTOMOE_ROW_FUNCTION static Register load(const std::byte* from) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  }
  AUTOMOE_ROW_FUNCTION static Register rounded(Register value) { return value; }
  AUTOMOE_ROW_FUNCTION static void store(std::byte* to, Register value) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to), oneNaN(value));
  }
};

template <>
struct Avx2Lanes<DType::kFloat16> : Format<DType::kFloat16>, FloatLanes {
  static constexpr DType kDType = DType::kFloat16;

  AUTOMOE_ROW_FUNCTION static Register load(const std::byte* from) {
    return _mm256_cvtph_ps(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  AUTOMOE_ROW_FUNCTION static __m128i narrow(Register value) {
    return _mm256_cvtps_ph(
        value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  AUTOMOE_ROW_FUNCTION static Register rounded(Register value) {
    return _mm256_cvtph_ps(narrow(value));
  }
  AUTOMOE_ROW_FUNCTION static void store(std::byte* to, Register value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), narrow(oneNaN(value)));
  }
};

/// Sixteen elements: those at even and those at odd places, since a 32-bit
/// word holds one of each and a shift or a mask widens it.
template <>
struct Avx2Lanes<DType::kBFloat16> : Format<DType::kBFloat16> {
  struct Register {
    __m256 even;
    __m256 odd;
  };
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr size_t kLanes = 16;
  static constexpr size_t kTileParts = 4;

  AUTOMOE_ROW_FUNCTION static Register spread(float value) {
    return {_mm256_set1_ps(value), _mm256_set1_ps(value)};
  }
  AUTOMOE_ROW_FUNCTION static Register add(Register a, Register b) {
    return {_mm256_add_ps(a.even, b.even), _mm256_add_ps(a.odd, b.odd)};
  }
  AUTOMOE_ROW_FUNCTION static Register multiply(Register a, Register b) {
    return {_mm256_mul_ps(a.even, b.even), _mm256_mul_ps(a.odd, b.odd)};
  }
  AUTOMOE_ROW_FUNCTION static Register load(const std::byte* from) {
    const __m256i words =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {
        _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
        _mm256_castsi256_ps(_mm256_and_si256(words, upperHalf()))};
  }
  AUTOMOE_ROW_FUNCTION static __m256i upperHalf() {
    return _mm256_set1_epi32(static_cast<int>(0xFFFF0000U));
  }
  /// See floatToBFloat16; what is left in the lower half is to be cut off.
  /// Of NaNs this makes anything.
  AUTOMOE_ROW_FUNCTION static __m256i roundUpperHalf(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i isOdd =
        _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(
        bits, _mm256_add_epi32(isOdd, _mm256_set1_epi32(0x7FFF)));
  }
  AUTOMOE_ROW_FUNCTION static __m256 roundedHalf(__m256 value) {
    const __m256 cut = _mm256_castsi256_ps(
        _mm256_and_si256(roundUpperHalf(value), upperHalf()));
    return _mm256_or_ps(cut, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  }
  AUTOMOE_ROW_FUNCTION static Register rounded(Register value) {
    return {roundedHalf(value.even), roundedHalf(value.odd)};
  }
  AUTOMOE_ROW_FUNCTION static void store(std::byte* to, Register value) {
    const __m256i even =
        _mm256_srli_epi32(roundUpperHalf(oneNaN(value.even)), 16);
    const __m256i odd = roundUpperHalf(oneNaN(value.odd));
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(to), _mm256_blend_epi16(even, odd, 0xAA));
  }
  AUTOMOE_ROW_FUNCTION static void storeSums(float* to, Register value) {
    const __m256 low = _mm256_unpacklo_ps(value.even, value.odd);
    const __m256 high = _mm256_unpackhi_ps(value.even, value.odd);
    _mm256_storeu_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
    _mm256_storeu_ps(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
  }
};

}  // namespace

const ReduceVariant kAvx2Reduce = {
    "avx2", reduceRowWith<Avx2Lanes>, scaleAndDotRowsWith<Avx2Lanes>};

}  // namespace automoe::kernels
#endif
