// SPDX-License-Identifier: Apache-2.0
#include "kernels/quantize.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/row_math.hpp"

namespace automoe::kernels {
namespace {

template <DType kDType>
float elementAt(const std::byte* row, size_t i) {
  typename Format<kDType>::Stored stored;
  std::memcpy(&stored, row + i * sizeof(stored), sizeof(stored));
  return Format<kDType>::widen(stored);
}

template <DType kDType>
void quantizeBlock(
    uint8_t* values, float* scale, const std::byte* row, size_t elements) {
  float largest = 0;
  for (size_t i = 0; i < elements; ++i) {
    largest = largerFinite(largest, elementAt<kDType>(row, i));
  }
  *scale = scaleFor(largest);
  const float inverse = 1.0F / *scale;
  for (size_t i = 0; i < elements; ++i) {
    values[i] = floatToFloat8E4M3(elementAt<kDType>(row, i) * inverse);
  }
}

template <DType kDType>
void dequantizeBlock(
    std::byte* row, const uint8_t* values, float scale, size_t elements) {
  for (size_t i = 0; i < elements; ++i) {
    const typename Format<kDType>::Stored stored =
        Format<kDType>::round(float8E4M3ToFloat(values[i]) * scale);
    std::memcpy(row + i * sizeof(stored), &stored, sizeof(stored));
  }
}

/// Calls call(dtype, block, begin, size) for each block of a row.
template <class Call>
void forEachBlock(DType dtype, size_t elements, const Call& call) {
  checkQuantizable(dtype);
  withDType(dtype, [&](auto type) {
    if constexpr (type != DType::kFloat64) {
      for (size_t begin = 0; begin < elements; begin += kScaleElements) {
        const size_t size = std::min(kScaleElements, elements - begin);
        call(type, begin / kScaleElements, begin, size);
      }
    }
  });
}

}  // namespace

void checkQuantizable(DType dtype) {
  if (dtype == DType::kFloat64) {
    throw std::invalid_argument(
        "dtype is float64, expected float32, bfloat16 or float16: convert the "
        "rows before they are quantized");
  }
}

void quantizeRow(
    DType dtype,
    uint8_t* values,
    float* scales,
    const std::byte* row,
    size_t elements) {
  const size_t bytes = elementBytes(dtype);
  forEachBlock(
      dtype, elements, [&](auto type, size_t block, size_t begin, size_t size) {
        quantizeBlock<type>(
            values + begin, scales + block, row + begin * bytes, size);
      });
}

void dequantizeRow(
    DType dtype,
    std::byte* row,
    const uint8_t* values,
    const float* scales,
    size_t elements) {
  const size_t bytes = elementBytes(dtype);
  forEachBlock(
      dtype, elements, [&](auto type, size_t block, size_t begin, size_t size) {
        dequantizeBlock<type>(
            row + begin * bytes, values + begin, scales[block], size);
      });
}

}  // namespace automoe::kernels
