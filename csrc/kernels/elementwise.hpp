// SPDX-License-Identifier: Apache-2.0
// What collectives compute: one array of the elements of several.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace automoe::kernels {

/// Types that collectives compute with. Everything else travels as bytes.
enum class ElementType : uint8_t {
  kBool = 0,
  kInt8,
  kUInt8,
  kInt16,
  kUInt16,
  kInt32,
  kUInt32,
  kInt64,
  kUInt64,
  kFloat16,
  kBFloat16,
  kFloat32,
  kFloat64,
};

enum class ReduceOperation : uint8_t {
  kSum = 0,
  kProduct,
  kMin,
  kMax,
  kBitAnd,
  kBitOr,
  kBitXor,
};

size_t elementBytes(ElementType type);
/// As torch calls it: "bfloat16", "bool", ...
const char* nameOf(ElementType type);
/// As torch.distributed calls it: "SUM", "BAND", ...
const char* nameOf(ReduceOperation operation);
/// False for bits of floating point numbers.
bool supports(ElementType type, ReduceOperation operation);

/// How a collective computes.
struct Reduction {
  ElementType type = ElementType::kFloat32;
  ReduceOperation operation = ReduceOperation::kSum;
  /// The last step divides by this: for averages. Integers round toward zero.
  uint32_t divisor = 1;

  bool operator==(const Reduction&) const = default;
};

/// to[i] = inputs[0][i] op inputs[1][i] op ..., from left to right, for `bytes`
/// bytes of elements. float16 and bfloat16 are computed in float and rounded
/// once, at the end; integers wrap around; sums and products of bool are "or"
/// and "and", as NCCL has them; a minimum or maximum with a NaN is NaN. When
/// `last`, the result is divided by the divisor before it is rounded. `to` may
/// be one of the inputs; otherwise memory does not overlap. One input is
/// copied, but for bool: any byte but 0 counts as true, and results are 0 or 1,
/// never divided. Needs supports(); addresses may be unaligned.
void reduceElements(
    const Reduction& reduction,
    std::byte* to,
    std::span<const std::byte* const> inputs,
    size_t bytes,
    bool last);

}  // namespace automoe::kernels
