// SPDX-License-Identifier: Apache-2.0
// What a rank gives to a combine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/dtype.hpp"

namespace automoe {

/// Memory of a combine on one rank. It must stay until
/// OperationCallbacks::released. The sum's type is double for float64 rows,
/// else float.
struct CombineArguments {
  std::span<const int32_t> route;
  std::span<const int32_t> receiveIndex;            // (R,)
  kernels::DType dtype = kernels::DType::kFloat32;  // of rows and out
  uint64_t elements = 0;                            // H
  const std::byte* rows = nullptr;                  // (R, H)
  // Flags and not null pointers: a tensor without rows has no address.
  bool weighted = false;               // else every weight is 1
  const std::byte* weights = nullptr;  // (R,) of the sum's type, if weighted
  bool withScalars = false;
  const std::byte* scalars = nullptr;  // (R,) of the sum's type, if so
  std::byte* out = nullptr;            // (T, H); (S, H) send rows when packed
  /// (T, K) of the sum's type, with scalars; 0 where a slot has no expert.
  std::byte* scalarsOut = nullptr;
  /// Without the sum over nodes: one row per send row. Only on routes whose
  /// nodes send sums.
  bool packed = false;

  uint64_t rowBytes() const { return elements * kernels::elementBytes(dtype); }
  uint64_t weightBytes() const {
    return weighted ? kernels::sumBytes(dtype) : 0;
  }
  uint64_t scalarBytes() const {
    return withScalars ? kernels::sumBytes(dtype) : 0;
  }
};

}  // namespace automoe
