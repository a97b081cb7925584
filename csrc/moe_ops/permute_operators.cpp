// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels/reduce.hpp"
#include "kernels/rows.hpp"
#include "moe_ops/local_inputs.hpp"
#include "moe_ops/operators.hpp"
#include "moe_ops/tensors.hpp"

namespace automoe {
namespace {

int32_t endOfExpert(int64_t begin, int64_t count, int64_t align) {
  const int64_t end = begin + (count + align - 1) / align * align;
  TORCH_CHECK_VALUE(
      end <= std::numeric_limits<int32_t>::max(),
      "permute: align is ",
      align,
      ", which makes more than ",
      std::numeric_limits<int32_t>::max(),
      " rows");
  return static_cast<int32_t>(end);
}

/// The slot of each row, by (expert, slot); -1 for padding.
at::Tensor slotsByExpert(
    const at::Tensor& ids,
    std::span<const int32_t> counts,
    std::span<const int32_t> ends) {
  at::Tensor index = emptyList(ends.empty() ? 0 : ends.back(), at::kInt);
  auto* slots = index.mutable_data_ptr<int32_t>();
  std::fill_n(slots, index.numel(), -1);
  std::vector<int32_t> next(counts.size(), 0);
  for (size_t expert = 1; expert < next.size(); ++expert) {
    next[expert] = ends[expert - 1];
  }
  const auto values = int32sOf(ids);
  for (size_t slot = 0; slot < values.size(); ++slot) {
    if (values[slot] >= 0) {
      slots[next[static_cast<size_t>(values[slot])]++] =
          static_cast<int32_t>(slot);
    }
  }
  return index;
}

/// Copies the row of the token of each slot; zeros for padding.
void gatherSlots(
    const at::Tensor& x,
    std::span<const int32_t> slots,
    int64_t topK,
    const at::Tensor& rows) {
  const uint64_t bytes = rowBytes(x);
  if (bytes == 0) {
    return;
  }
  std::byte* to = mutableBytesOf(rows);
  for (const int32_t slot : slots) {
    if (slot < 0) {
      std::memset(to, 0, bytes);
    } else {
      const auto token = static_cast<size_t>(slot / topK);
      std::memcpy(to, bytesOf(x) + token * bytes, bytes);
    }
    to += bytes;
  }
}

/// The rows of each token, ascending.
struct TokenRows {
  std::vector<size_t> begins;
  std::vector<int32_t> rows;
};

TokenRows rowsByToken(
    std::span<const int32_t> index, int64_t numTokens, int64_t topK) {
  TokenRows sorted;
  sorted.begins.assign(static_cast<size_t>(numTokens) + 1, 0);
  for (size_t row = 0; row < index.size(); ++row) {
    TORCH_CHECK_VALUE(
        index[row] >= -1 && index[row] < numTokens * topK,
        "unpermute: index[",
        row,
        "] is ",
        index[row],
        ", expected -1 (padding) or a slot below num_tokens * topk, ",
        numTokens * topK);
    if (index[row] >= 0) {
      sorted.begins[static_cast<size_t>(index[row] / topK) + 1] += 1;
    }
  }
  for (size_t token = 0; token + 1 < sorted.begins.size(); ++token) {
    sorted.begins[token + 1] += sorted.begins[token];
  }
  sorted.rows.resize(sorted.begins.back());
  std::vector<size_t> next(sorted.begins.begin(), sorted.begins.end() - 1);
  for (size_t row = 0; row < index.size(); ++row) {
    if (index[row] >= 0) {
      const auto token = static_cast<size_t>(index[row] / topK);
      sorted.rows[next[token]++] = static_cast<int32_t>(row);
    }
  }
  return sorted;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> scaleAndDot(
    const at::Tensor& grads,
    const at::Tensor& values,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index) {
  const ScaleAndDotInputs taken =
      takeScaleAndDot(grads, values, weights, index);
  const at::Tensor& rows = taken.grads;
  std::byte* scaled = mutableBytesOf(taken.scaled);
  std::byte* dots = mutableBytesOf(taken.dots);
  if (rows.numel() > 0) {
    std::memcpy(scaled, bytesOf(rows), rows.nbytes());
  }
  kernels::scaleAndDotRows(
      taken.dtype,
      scaled,
      bytesOf(taken.values),
      bytesOf(taken.weights),
      dots,
      static_cast<size_t>(taken.count),
      rowElements(rows));
  const auto places = int32sOf(taken.index);
  const size_t dotBytes = kernels::sumBytes(taken.dtype);
  const uint64_t bytes = rowBytes(rows);
  for (size_t row = 0; row < places.size(); ++row) {
    if (places[row] < 0) {
      std::memset(scaled + row * bytes, 0, bytes);
      std::memset(dots + row * dotBytes, 0, dotBytes);
    }
  }
  return {taken.scaled, taken.dots};
}

PlanTensors permute(
    const at::Tensor& x,
    const at::Tensor& topkIds,
    int64_t numExperts,
    int64_t align) {
  checkPermutation(numExperts, align);
  const at::Tensor checked = checkedIds("permute", topkIds);
  const std::string wrong = findIllegalId("permute", checked, numExperts);
  TORCH_CHECK_VALUE(wrong.empty(), wrong);
  const at::Tensor ids = checked.to(at::kInt);
  const at::Tensor tokens = rowsOf("permute", "x", x, ids.size(0));
  std::vector<int32_t> counts(static_cast<size_t>(numExperts), 0);
  kernels::countIds(int32sOf(ids), counts);
  std::vector<int32_t> ends;
  for (const int32_t count : counts) {
    ends.push_back(endOfExpert(ends.empty() ? 0 : ends.back(), count, align));
  }
  at::Tensor index = slotsByExpert(ids, counts, ends);
  at::Tensor rows = emptyRows(tokens, index.numel());
  gatherSlots(tokens, int32sOf(index), ids.size(1), rows);
  return {rows, index, toTensor(counts), toTensor(ends)};
}

at::Tensor unpermute(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index,
    int64_t numTokens,
    int64_t topK) {
  const UnpermuteInputs taken =
      takeUnpermute(rows, weights, index, numTokens, topK);
  const auto& [dtype, terms, factors, places, out] = taken;
  const TokenRows sorted = rowsByToken(int32sOf(places), numTokens, topK);
  const uint64_t bytes = rowBytes(terms);
  const size_t factorBytes = kernels::sumBytes(dtype);
  std::vector<const std::byte*> of;
  std::vector<std::byte> ofWeights;
  for (size_t token = 0; token < static_cast<size_t>(numTokens); ++token) {
    of.clear();
    ofWeights.clear();
    for (size_t i = sorted.begins[token]; i < sorted.begins[token + 1]; ++i) {
      const auto row = static_cast<size_t>(sorted.rows[i]);
      of.push_back(bytesOf(terms) + row * bytes);
      if (factors.defined()) {
        const std::byte* factor = bytesOf(factors) + row * factorBytes;
        ofWeights.insert(ofWeights.end(), factor, factor + factorBytes);
      }
    }
    const auto end = static_cast<uint32_t>(of.size());
    kernels::reduceRow(
        dtype,
        mutableBytesOf(out) + token * bytes,
        of,
        factors.defined() ? ofWeights.data() : nullptr,
        std::span(&end, 1),
        rowElements(terms));
  }
  return out;
}

}  // namespace automoe
