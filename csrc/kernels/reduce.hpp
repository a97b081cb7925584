// SPDX-License-Identifier: Apache-2.0
// Weighted sums of rows, in an order that the caller fixes. The same bits come
// out on every processor: products are rounded before they are added, and
// lanes are joined in one order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/dtype.hpp"

namespace automoe::kernels {

/// out = sum over segments, in order, of
///         round(sum over the terms of the segment, in order, of
///                 weights[i] * rows[i]).
/// Sums are taken in double for float64, else in float; round() is to `dtype`,
/// as is the result. A sum begins with its first term (not with zero). A
/// segment without a term contributes nothing; no term at all gives zeros.
/// Where every segment has one term and there are no weights, round() changes
/// nothing. Every NaN of the result is the positive quiet one without payload.
///
/// rows: `elements` values of `dtype` each, at any address. weights: one value
/// of the sum's type per row, or null for 1. segmentEnds: ascending, the last
/// one is rows.size(). `out` may be a row; otherwise it overlaps none.
/// Throws std::invalid_argument when segmentEnds is not so.
void reduceRow(
    DType dtype,
    std::byte* out,
    std::span<const std::byte* const> rows,
    const void* weights,
    std::span<const uint32_t> segmentEnds,
    size_t elements);

/// For each row i: dots[i] = sum of grads[i] * values[i] in the order of
/// kDotLanes (row_math.hpp), when `dots` is not null; then grads[i] =
/// round(weights[i] * grads[i]) in place, when `weights` is not null. Rows are
/// contiguous, `count` of `elements` values; weights and dots have the sum's
/// type. `values` is read only for `dots`. NaNs as above.
void scaleAndDotRows(
    DType dtype,
    std::byte* grads,
    const std::byte* values,
    const void* weights,
    void* dots,
    size_t count,
    size_t elements);

}  // namespace automoe::kernels
