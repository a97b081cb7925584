// SPDX-License-Identifier: Apache-2.0
// The sums of reduce.hpp as compiled for one instruction set. All variants
// give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/dtype.hpp"

namespace automoe::kernels {

/// What is summed: at least one row. Segments may be empty.
struct Terms {
  const std::byte* const* rows = nullptr;
  const void* weights = nullptr;  // null: 1
  size_t numRows = 0;
  const uint32_t* segmentEnds = nullptr;
  size_t numSegments = 0;  // 0: one sum over all rows, rounded once
};

/// The functions of reduce.hpp without its checks. scaleAndDotRows is called
/// with weights, dots or both.
struct ReduceVariant {
  const char* name;
  void (*reduceRow)(
      DType dtype, std::byte* out, const Terms& terms, size_t elements);
  void (*scaleAndDotRows)(
      DType dtype,
      std::byte* grads,
      const std::byte* values,
      const void* weights,
      void* dots,
      size_t count,
      size_t elements);
};

extern const ReduceVariant kPlainReduce;
#ifdef __x86_64__
extern const ReduceVariant kAvx2Reduce;
extern const ReduceVariant kAvx512Reduce;
#endif

/// Those that this processor can run, the fastest last.
std::span<const ReduceVariant* const> supportedReduceVariants();

}  // namespace automoe::kernels
