// SPDX-License-Identifier: Apache-2.0
// What tests of the ways of rows on devices share: as 8-bit floats between
// nodes, by copy engines inside of one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels/quantize.hpp"
#include "process_group/exchange/device_reads.hpp"

namespace automoe::testing {

/// Copies take no time, so all rows come by them.
constexpr ReadRates kFreeCopies = {
    .engine = 1e9, .kernel = 1, .block = 1, .memory = 1e9, .memoryBlock = 1e9};

/// The same for so many node-mates.
inline std::vector<std::optional<ReadRates>> freeCopies(int mates) {
  return std::vector<std::optional<ReadRates>>(
      static_cast<size_t>(mates), kFreeCopies);
}

/// Makes rows what they are after a way as 8-bit floats.
inline void roundRows(
    std::span<std::byte> rows, kernels::DType dtype, size_t elements) {
  const size_t rowBytes = elements * kernels::elementBytes(dtype);
  std::vector<uint8_t> values(elements);
  std::vector<float> scales((elements + 127) / 128);
  for (size_t at = 0; at < rows.size(); at += rowBytes) {
    std::byte* const row = rows.data() + at;
    kernels::quantizeRow(dtype, values.data(), scales.data(), row, elements);
    kernels::dequantizeRow(dtype, row, values.data(), scales.data(), elements);
  }
}

}  // namespace automoe::testing
