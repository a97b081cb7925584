// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/kernel_operators.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>

#include <limits>
#include <numeric>
#include <utility>

#include "kernels/device_kernels.hpp"
#include "moe_ops/device_launch.hpp"
#include "moe_ops/host_staging.hpp"
#include "moe_ops/route_parts.hpp"
#include "moe_ops/staged_operators.hpp"
#include "moe_ops/tensors.hpp"

namespace automoe::by_kernels {
namespace {

static_assert(kMostParts <= kernels::RowBases::kMost);

const int32_t* wordsOf(const at::Tensor& tensor) {
  return tensor.const_data_ptr<int32_t>();
}

template <typename Call>
void launch(const at::Tensor& on, const Call& call) {
  launchOn(on.device(), [&](kernels::DeviceStream stream) {
    kernels::enqueue(call, stream);
  });
}

/// A list of the host on the device; the host does not wait.
at::Tensor upload(
    const HostStaging& staging, const std::vector<int32_t>& values) {
  return staging.toDevice(toTensor(values));
}

/// Ids as int32; those that are neither -1 nor an expert become -2.
at::Tensor narrowIds(const at::Tensor& ids, int64_t numExperts) {
  const at::Tensor legal = ids.ge(-1).logical_and_(ids.lt(numExperts));
  return ids.to(at::kInt).masked_fill(legal.logical_not_(), -2).contiguous();
}

/// On the host: how many ids are -1, then how many are of each expert.
at::Tensor countOnHost(
    HostStaging& staging, const at::Tensor& ids, int64_t numExperts) {
  const at::Tensor shifted = ids.add(1);
  const at::Tensor counts = emptyList(numExperts + 1, at::kInt, ids.device());
  launch(
      ids,
      kernels::CountIds{
          .ids = wordsOf(shifted),
          .count = static_cast<size_t>(shifted.numel()),
          .counts = counts.mutable_data_ptr<int32_t>(),
          .experts = static_cast<size_t>(numExperts) + 1});
  at::Tensor host = staging.toHost("topk_ids", counts);
  staging.await();
  return host;
}

int64_t paddedRows(std::span<const int32_t> counts, int64_t align) {
  int64_t rows = 0;
  for (const int64_t count : counts) {
    rows += (count + align - 1) / align * align;
  }
  return rows;
}

}  // namespace

bool serve(c10::Device device) {
#ifdef AUTOMOE_CUDA
  return device.is_cuda();
#else
  (void)device;
  return false;
#endif
}

std::vector<at::Tensor> packRows(const at::Tensor& x, at::TensorList routes) {
  const Routes taken = takeRoutes("pack_rows", routes);
  const at::Tensor rows =
      rowsOf("pack_rows", "x", x, taken.views.front().numTokens(), x.device());
  const HostStaging staging("pack_rows", x.device());
  std::vector<at::Tensor> packed;
  for (const Route& route : taken.views) {
    const at::Tensor tokens = upload(staging, sendTokens(route));
    packed.push_back(emptyRows(rows, tokens.numel()));
    kernels::GatherRows call{
        .to = mutableBytesOf(packed.back()),
        .count = static_cast<size_t>(tokens.numel()),
        .rowBytes = rowBytes(rows),
        .index = wordsOf(tokens)};
    call.from.at[0] = bytesOf(rows);
    launch(rows, call);
  }
  return packed;
}

at::Tensor reducePartials(
    at::TensorList partials, at::TensorList routes, int64_t numTokens) {
  const Routes taken = takeRoutes("reduce_partials", routes);
  const std::vector<at::Tensor> rows = takePartials(taken, partials, numTokens);
  const HostStaging staging("reduce_partials", rows[0].device());
  const PartialTerms terms = partialTerms(taken.views);
  const at::Tensor begins = upload(staging, terms.begins);
  const at::Tensor parts = upload(staging, terms.parts);
  const at::Tensor index = upload(staging, terms.rows);
  at::Tensor out = emptyRows(rows[0], numTokens);
  kernels::ReduceRows call{
      .dtype = dtypeOf("reduce_partials", "partials", rows[0]),
      .to = mutableBytesOf(out),
      .count = static_cast<size_t>(numTokens),
      .elements = rowElements(out),
      .termBegin = wordsOf(begins),
      .base = wordsOf(parts),
      .index = wordsOf(index)};
  for (size_t i = 0; i < rows.size(); ++i) {
    call.rows.at[i] = bytesOf(rows[i]);
  }
  launch(out, call);
  return out;
}

std::tuple<at::Tensor, at::Tensor> scaleAndDot(
    const at::Tensor& grads,
    const at::Tensor& values,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index) {
  constexpr const char* kCall = "scale_and_dot";
  const c10::Device device = grads.device();
  const at::Tensor rows = rowsOf(kCall, "grads", grads, -1, device);
  const kernels::DType dtype = dtypeOf(kCall, "grads", rows);
  const at::Tensor others =
      floats(kCall, "values", values, rows.sizes(), device);
  TORCH_CHECK_VALUE(
      others.scalar_type() == rows.scalar_type(),
      "scale_and_dot: values is ",
      others.scalar_type(),
      ", expected the dtype of grads, ",
      rows.scalar_type());
  const int64_t count = rows.size(0);
  const at::Tensor factors =
      sumValues(kCall, "weights", weights, dtype, count, device);
  const at::Tensor slots = int32List(kCall, "index", index, count, device);
  at::Tensor scaled = emptyRows(rows, count);
  at::Tensor dots = emptyList(count, sumTypeOf(dtype), device);
  launch(
      rows,
      kernels::ScaleAndDot{
          .dtype = dtype,
          .scaled = mutableBytesOf(scaled),
          .dots = mutableBytesOf(dots),
          .grads = bytesOf(rows),
          .values = bytesOf(others),
          .weights = bytesOf(factors),
          .index = wordsOf(slots),
          .count = static_cast<size_t>(count),
          .elements = rowElements(rows)});
  return {scaled, dots};
}

PlanTensors permute(
    const at::Tensor& x,
    const at::Tensor& topkIds,
    int64_t numExperts,
    int64_t align) {
  constexpr const char* kCall = "permute";
  checkPermutation(numExperts, align);
  const c10::Device device = x.device();
  const at::Tensor given = checkedIds(kCall, topkIds, device);
  const at::Tensor tokens = rowsOf(kCall, "x", x, given.size(0), device);
  const at::Tensor ids = narrowIds(given, numExperts);
  HostStaging staging(kCall, device);
  const at::Tensor counted = countOnHost(staging, ids, numExperts);
  const auto counts = int32sOf(counted);
  const int64_t numRows = paddedRows(counts.subspan(1), align);
  if (std::accumulate(counts.begin(), counts.end(), int64_t{0}) !=
          ids.numel() ||
      numRows > std::numeric_limits<int32_t>::max()) {
    // It says what is wrong.
    return staged::permute(x, topkIds, numExperts, align);
  }
  at::Tensor index = emptyList(numRows, at::kInt, device);
  at::Tensor perExpert = emptyList(numExperts, at::kInt, device);
  at::Tensor ends = emptyList(numExperts, at::kInt, device);
  kernels::SortSlots sort{
      .ids = wordsOf(ids),
      .count = static_cast<size_t>(ids.numel()),
      .experts = static_cast<size_t>(numExperts),
      .align = static_cast<size_t>(align),
      .counts = perExpert.mutable_data_ptr<int32_t>(),
      .ends = ends.mutable_data_ptr<int32_t>(),
      .index = index.mutable_data_ptr<int32_t>(),
      .rows = static_cast<size_t>(numRows)};
  const at::Tensor scratch = emptyList(
      static_cast<int64_t>(kernels::scratchBytes(sort)), at::kByte, device);
  sort.scratch = scratch.mutable_data_ptr();
  launch(ids, sort);
  const at::Tensor tokenOfRow = index.div(given.size(1), "floor");
  at::Tensor rows = emptyRows(tokens, numRows);
  kernels::GatherRows gather{
      .to = mutableBytesOf(rows),
      .count = static_cast<size_t>(numRows),
      .rowBytes = rowBytes(tokens),
      .index = wordsOf(tokenOfRow)};
  gather.from.at[0] = bytesOf(tokens);
  launch(rows, gather);
  return {rows, index, perExpert, ends};
}

at::Tensor unpermute(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index,
    int64_t numTokens,
    int64_t topK) {
  constexpr const char* kCall = "unpermute";
  checkTokens(numTokens, topK);
  const c10::Device device = rows.device();
  const at::Tensor places = int32List(kCall, "index", index, -1, device);
  const at::Tensor terms = rowsOf(kCall, "rows", rows, places.numel(), device);
  const kernels::DType dtype = dtypeOf(kCall, "rows", terms);
  const at::Tensor factors =
      sumValues(kCall, "weights", weights, dtype, places.numel(), device);
  // The rows of each token, ascending; those of padding come after all tokens.
  const at::Tensor tokens =
      places.div(topK, "floor").masked_fill_(places.lt(0), numTokens);
  const auto [sorted, order] =
      tokens.sort(/*stable=*/std::optional(true), /*dim=*/0);
  const at::Tensor order32 = order.to(at::kInt);
  const at::Tensor begins = at::searchsorted(
      sorted,
      at::arange(numTokens + 1, tokens.options()),
      /*out_int32=*/true);
  at::Tensor out = emptyRows(terms, numTokens);
  kernels::ReduceRows call{
      .dtype = dtype,
      .to = mutableBytesOf(out),
      .count = static_cast<size_t>(numTokens),
      .elements = rowElements(out),
      .termBegin = wordsOf(begins),
      .index = wordsOf(order32),
      .weighted = factors.defined()};
  call.rows.at[0] = bytesOf(terms);
  call.weights.at[0] = bytesOf(factors);
  launch(out, call);
  return out;
}

}  // namespace automoe::by_kernels
