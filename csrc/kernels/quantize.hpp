// SPDX-License-Identifier: Apache-2.0
// Rows as 8-bit floats (E4M3, torch's float8_e4m3fn) with a scale for every 128
// elements: half the bytes of bfloat16, for the way between nodes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/dtype.hpp"

namespace automoe::kernels {

/// For each block of 128 elements (the last one may be shorter): scale = the
/// largest finite magnitude / 448, value = round(element * (1 / scale)), to the
/// nearest 8-bit float, ties to even. A block of zeros has the scale 1, and no
/// scale is below 2^-126. Infinities and NaNs become NaN. The same bits come
/// out everywhere. values: (elements,); scales: (scalesOf(elements),); `row`
/// may lie at any address. Throws as checkQuantizable().
void quantizeRow(
    DType dtype,
    uint8_t* values,
    float* scales,
    const std::byte* row,
    size_t elements);

/// element = round(value * scale), to `dtype`. As above.
void dequantizeRow(
    DType dtype,
    std::byte* row,
    const uint8_t* values,
    const float* scales,
    size_t elements);

/// Throws std::invalid_argument for float64.
void checkQuantizable(DType dtype);

}  // namespace automoe::kernels
