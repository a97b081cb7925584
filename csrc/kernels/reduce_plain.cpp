// SPDX-License-Identifier: Apache-2.0
// The sums for any processor: what the compiler makes of short vectors.
#include <cstring>

#define AUTOMOE_TARGET
#include "kernels/row_sums.hpp"

namespace automoe::kernels {
namespace {

template <DType kType>
struct PlainLanes {
  using Stored = typename Format<kType>::Stored;
  using Sum = typename Format<kType>::Sum;
  static constexpr DType kDType = kType;
  static constexpr size_t kVectorBytes = 16;  // of SSE2 and of NEON
  static constexpr size_t kLanes = kVectorBytes / sizeof(Sum);
  static constexpr size_t kTileParts = 4;
  using Register [[gnu::vector_size(kVectorBytes)]] = Sum;

  AUTOMOE_ROW_FUNCTION static Register spread(Sum value) {
    Sum sums[kLanes];
    for (Sum& sum : sums) {
      sum = value;
    }
    Register made;
    std::memcpy(&made, sums, sizeof(made));
    return made;
  }
  AUTOMOE_ROW_FUNCTION static Register add(Register a, Register b) {
    return a + b;
  }
  AUTOMOE_ROW_FUNCTION static Register multiply(Register a, Register b) {
    return a * b;
  }
  AUTOMOE_ROW_FUNCTION static Register load(const std::byte* from) {
    Stored stored[kLanes];
    std::memcpy(stored, from, sizeof(stored));
    Register made;
    AUTOMOE_UNROLL
    for (size_t i = 0; i < kLanes; ++i) {
      made[i] = Format<kType>::widen(stored[i]);
    }
    return made;
  }
  AUTOMOE_ROW_FUNCTION static Register rounded(Register value) {
    AUTOMOE_UNROLL
    for (size_t i = 0; i < kLanes; ++i) {
      value[i] = Format<kType>::widen(Format<kType>::round(value[i]));
    }
    return value;
  }
  AUTOMOE_ROW_FUNCTION static void store(std::byte* to, Register value) {
    Sum sums[kLanes];
    storeSums(sums, value);
    Stored stored[kLanes];
    for (size_t i = 0; i < kLanes; ++i) {
      stored[i] = Format<kType>::round(sums[i]);
    }
    std::memcpy(to, stored, sizeof(stored));
  }
  AUTOMOE_ROW_FUNCTION static void storeSums(Sum* to, Register value) {
    std::memcpy(to, &value, sizeof(value));
  }
};

}  // namespace

const ReduceVariant kPlainReduce = {
    "plain", reduceRowWith<PlainLanes>, scaleAndDotRowsWith<PlainLanes>};

}  // namespace automoe::kernels
