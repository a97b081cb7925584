// SPDX-License-Identifier: Apache-2.0
// The sums for the AVX-512 foundation; see reduce_avx2.cpp.
#ifdef __x86_64__
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 finds the "undefined" operands of its own intrinsics (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#define AUTOMOE_TARGET __attribute__((target("avx512f")))
#include "kernels/row_sums.hpp"

namespace automoe::kernels {
namespace {

AUTOMOE_ROW_FUNCTION __m512 oneNaN(__m512 value) {
  const __mmask16 isNaN = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(value, isNaN, _mm512_set1_ps(floatOf(kFloatNaN)));
}

template <DType>
struct Avx512Lanes;

template <>
struct Avx512Lanes<DType::kFloat64> : Format<DType::kFloat64> {
  using Register = __m512d;
  static constexpr DType kDType = DType::kFloat64;
  static constexpr size_t kLanes = 8;
  static constexpr size_t kTileParts = 8;

  AUTOMOE_ROW_FUNCTION static Register spread(double value) {
    return _mm512_set1_pd(value);
  }
  AUTOMOE_ROW_FUNCTION static Register add(Register a, Register b) {
    return _mm512_add_pd(a, b);
  }
  AUTOMOE_ROW_FUNCTION static Register multiply(Register a, Register b) {
    return _mm512_mul_pd(a, b);
  }
  AUTOMOE_ROW_FUNCTION static Register load(const std::byte* from) {
    return _mm512_loadu_pd(from);
  }
  AUTOMOE_ROW_FUNCTION static Register rounded(Register value) { return value; }
  AUTOMOE_ROW_FUNCTION static void store(std::byte* to, Register value) {
    double nan;
    std::memcpy(&nan, &kDoubleNaN, sizeof(nan));
    const __mmask8 isNaN = _mm512_cmp_pd_mask(value, value, _CMP_UNORD_Q);
    _mm512_storeu_pd(to, _mm512_mask_mov_pd(value, isNaN, _mm512_set1_pd(nan)));
  }
  AUTOMOE_ROW_FUNCTION static void storeSums(double* to, Register value) {
    _mm512_storeu_pd(to, value);
  }
};

/// What the types that are summed in sixteen floats share.
struct FloatLanes {
  using Register = __m512;
  static constexpr size_t kLanes = 16;
  static constexpr size_t kTileParts = 8;

  AUTOMOE_ROW_FUNCTION static Register spread(float value) {
    return _mm512_set1_ps(value);
  }
  AUTOMOE_ROW_FUNCTION static Register add(Register a, Register b) {
    return _mm512_add_ps(a, b);
  }
  AUTOMOE_ROW_FUNCTION static Register multiply(Register a, Register b) {
    return _mm512_mul_ps(a, b);
  }
  AUTOMOE_ROW_FUNCTION static void storeSums(float* to, Register value) {
    _mm512_storeu_ps(to, value);
  }
};

template <>
struct Avx512Lanes<DType::kFloat32> : Format<DType::kFloat32>, FloatLanes {
  static constexpr DType kDType = DType::kFloat32;

  AUTOMOE_ROW_FUNCTION static Register load(const std::byte* from) {
    return _mm512_loadu_ps(from);
  }
  AUTOMOE_ROW_FUNCTION static Register rounded(Register value) { return value; }
  AUTOMOE_ROW_FUNCTION static void store(std::byte* to, Register value) {
    _mm512_storeu_ps(to, oneNaN(value));
  }
};

template <>
struct Avx512Lanes<DType::kFloat16> : Format<DType::kFloat16>, FloatLanes {
  static constexpr DType kDType = DType::kFloat16;

  AUTOMOE_ROW_FUNCTION static Register load(const std::byte* from) {
    return _mm512_cvtph_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  AUTOMOE_ROW_FUNCTION static __m256i narrow(Register value) {
    return _mm512_cvtps_ph(
        value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  AUTOMOE_ROW_FUNCTION static Register rounded(Register value) {
    return _mm512_cvtph_ps(narrow(value));
  }
  AUTOMOE_ROW_FUNCTION static void store(std::byte* to, Register value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(oneNaN(value)));
  }
};

/// Thirty-two elements: those at even and those at odd places.
template <>
struct Avx512Lanes<DType::kBFloat16> : Format<DType::kBFloat16> {
  struct Register {
    __m512 even;
    __m512 odd;
  };
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr size_t kLanes = 32;
  static constexpr size_t kTileParts = 4;

  AUTOMOE_ROW_FUNCTION static Register spread(float value) {
    return {_mm512_set1_ps(value), _mm512_set1_ps(value)};
  }
  AUTOMOE_ROW_FUNCTION static Register add(Register a, Register b) {
    return {_mm512_add_ps(a.even, b.even), _mm512_add_ps(a.odd, b.odd)};
  }
  AUTOMOE_ROW_FUNCTION static Register multiply(Register a, Register b) {
    return {_mm512_mul_ps(a.even, b.even), _mm512_mul_ps(a.odd, b.odd)};
  }
  AUTOMOE_ROW_FUNCTION static Register load(const std::byte* from) {
    const __m512i words = _mm512_loadu_si512(from);
    return {
        _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
        _mm512_castsi512_ps(_mm512_and_si512(words, upperHalf()))};
  }
  AUTOMOE_ROW_FUNCTION static __m512i upperHalf() {
    return _mm512_set1_epi32(static_cast<int>(0xFFFF0000U));
  }
  /// See floatToBFloat16; what is left in the lower half is to be cut off.
  /// The instruction of AVX512-BF16 would take subnormals for zeros.
  AUTOMOE_ROW_FUNCTION static __m512i roundUpperHalf(__m512 value) {
    const __m512i bits = _mm512_castps_si512(oneNaN(value));
    const __m512i isOdd =
        _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(
        bits, _mm512_add_epi32(isOdd, _mm512_set1_epi32(0x7FFF)));
  }
  AUTOMOE_ROW_FUNCTION static __m512i roundedHalf(__m512 value) {
    return _mm512_and_si512(roundUpperHalf(value), upperHalf());
  }
  AUTOMOE_ROW_FUNCTION static Register rounded(Register value) {
    return {
        _mm512_castsi512_ps(roundedHalf(value.even)),
        _mm512_castsi512_ps(roundedHalf(value.odd))};
  }
  AUTOMOE_ROW_FUNCTION static void store(std::byte* to, Register value) {
    const __m512i even = _mm512_srli_epi32(roundUpperHalf(value.even), 16);
    _mm512_storeu_si512(to, _mm512_or_si512(even, roundedHalf(value.odd)));
  }
  AUTOMOE_ROW_FUNCTION static void storeSums(float* to, Register value) {
    // Indices of 16 and more are into `odd`.
    const __m512i low = _mm512_setr_epi32(
        0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    _mm512_storeu_ps(to, _mm512_permutex2var_ps(value.even, low, value.odd));
    _mm512_storeu_ps(
        to + 16, _mm512_permutex2var_ps(value.even, high, value.odd));
  }
};

}  // namespace

const ReduceVariant kAvx512Reduce = {
    "avx512", reduceRowWith<Avx512Lanes>, scaleAndDotRowsWith<Avx512Lanes>};

}  // namespace automoe::kernels
#endif
