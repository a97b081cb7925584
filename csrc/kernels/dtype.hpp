// SPDX-License-Identifier: Apache-2.0
// The number types that rows are summed in and rounded to.
#pragma once

#include <cstddef>
#include <cstdint>

namespace automoe::kernels {

/// Types with arithmetic. Everything else travels as bytes.
enum class DType : uint8_t {
  kFloat64 = 0,
  kFloat32 = 1,
  kBFloat16 = 2,
  kFloat16 = 3,
};

constexpr size_t elementBytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

/// As torch calls it; "?" for a number that is no type.
constexpr const char* nameOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "?";
}

/// Sums are taken in double for float64, in float for everything else.
constexpr size_t sumBytes(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : 4;
}

}  // namespace automoe::kernels
