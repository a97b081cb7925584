// SPDX-License-Identifier: Apache-2.0
// Moving, comparing and probing rows of bytes. Rows lie at any address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace automoe::kernels {

/// Copies row index[i] of `from` to row i of `to`.
void gatherRows(
    std::byte* to,
    const std::byte* from,
    std::span<const int32_t> index,
    size_t rowBytes);

/// Copies row i of `from` to row index[i] of `to`.
void scatterRows(
    std::byte* to,
    std::span<const int32_t> index,
    const std::byte* from,
    size_t rowBytes);

/// True when the two rows hold the same bytes.
bool sameRow(const std::byte* a, const std::byte* b, size_t rowBytes);

/// A hash of at most 64 bytes taken evenly from the row: equal rows have equal
/// probes, different rows most likely not.
uint64_t probeRow(const std::byte* row, size_t rowBytes);

/// counts[id] += 1 for every id; ids outside [0, counts.size()) are left out.
void countIds(std::span<const int32_t> ids, std::span<int32_t> counts);

}  // namespace automoe::kernels
