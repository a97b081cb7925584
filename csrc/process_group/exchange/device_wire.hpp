// SPDX-License-Identifier: Apache-2.0
// In what form rows of numbers cross from node to node on devices. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "kernels/dtype.hpp"
#include "process_group/exchange/row_moves.hpp"

namespace automoe {

/// What the rows of a dispatch are between nodes. Sums of a combine always go
/// as they are: each of them would be rounded once more.
enum class DeviceWire : uint8_t {
  kAsIs = 0,
  /// Rows of bfloat16, float16 and float32 go as 8-bit floats with a scale for
  /// every 128 elements (kernels/quantize.hpp), where that takes fewer bytes.
  /// Everything else, and rows for the own node, stay as they are.
  kFp8 = 1,
};

/// "as they are" or "as 8-bit floats".
const char* nameOf(DeviceWire wire);

/// Rows of one field as 8-bit floats.
struct Fp8Format {
  kernels::DType dtype = kernels::DType::kBFloat16;  // what they are made of
  size_t elements = 0;                               // of a row

  uint64_t rowBytes() const { return elements * kernels::elementBytes(dtype); }
  uint64_t valueBytes() const { return elements; }  // of a row
  uint64_t scaleBytes() const;                      // the same
};

/// Nothing: rows of the field go as they are. A function of what all ranks
/// agree on, so both sides of a transfer find the same.
std::optional<Fp8Format> fp8FormatOf(
    const DispatchArguments::Field& field, DeviceWire wire);

}  // namespace automoe
