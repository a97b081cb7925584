// SPDX-License-Identifier: Apache-2.0
#include "kernels/reduce.hpp"

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/reduce_variant.hpp"

namespace automoe::kernels {
namespace {

/// Checks the segments and counts those that have a term.
size_t countSegments(std::span<const uint32_t> segmentEnds, size_t numRows) {
  size_t count = 0;
  size_t begin = 0;
  for (size_t i = 0; i < segmentEnds.size(); ++i) {
    const size_t end = segmentEnds[i];
    if (end < begin || end > numRows) {
      throw std::invalid_argument(
          "segmentEnds[" + std::to_string(i) + "] is " + std::to_string(end) +
          ", expected at least " + std::to_string(begin) +
          " (the segment's begin) and at most " + std::to_string(numRows) +
          " (the number of rows)");
    }
    count += end > begin ? 1 : 0;
    begin = end;
  }
  if (begin != numRows) {
    throw std::invalid_argument(
        "segmentEnds ends with " + std::to_string(begin) + ", expected " +
        std::to_string(numRows) + " (the number of rows)");
  }
  return count;
}

std::vector<const ReduceVariant*> findSupported() {
  std::vector<const ReduceVariant*> found = {&kPlainReduce};
#ifdef __x86_64__
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) {
    found.push_back(&kAvx2Reduce);
    if (__builtin_cpu_supports("avx512f")) {
      found.push_back(&kAvx512Reduce);
    }
  }
#endif
  return found;
}

const ReduceVariant& fastest() {
  static const ReduceVariant& chosen = *supportedReduceVariants().back();
  return chosen;
}

}  // namespace

std::span<const ReduceVariant* const> supportedReduceVariants() {
  static const std::vector<const ReduceVariant*> supported = findSupported();
  return supported;
}

void reduceRow(
    DType dtype,
    std::byte* out,
    std::span<const std::byte* const> rows,
    const void* weights,
    std::span<const uint32_t> segmentEnds,
    size_t elements) {
  const size_t numSegments = countSegments(segmentEnds, rows.size());
  if (elements == 0) {
    return;
  }
  if (rows.empty()) {
    std::memset(out, 0, elements * elementBytes(dtype));
    return;
  }
  Terms terms{rows.data(), weights, rows.size(), segmentEnds.data(), 0};
  // Otherwise only the result needs to be rounded: rounding twice, or rounding
  // what was not computed, changes nothing.
  const bool roundsTerms = weights != nullptr || numSegments < rows.size();
  if (numSegments > 1 && roundsTerms) {
    terms.numSegments = segmentEnds.size();
  }
  fastest().reduceRow(dtype, out, terms, elements);
}

void scaleAndDotRows(
    DType dtype,
    std::byte* grads,
    const std::byte* values,
    const void* weights,
    void* dots,
    size_t count,
    size_t elements) {
  if (weights != nullptr || dots != nullptr) {
    fastest().scaleAndDotRows(
        dtype, grads, values, weights, dots, count, elements);
  }
}

}  // namespace automoe::kernels
