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
#include "moe_ops/local_inputs.hpp"
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

/// The terms of sums over these routes, on the device: begins, parts, rows.
RouteTensors::Tensors uploadTerms(const Routes& routes, c10::Device device) {
  RouteTensors::Key key{RouteTensors::Kind::kTerms};
  for (const auto& route : routes) {
    key.numbers.push_back(route->serial);
  }
  return routes.front()->tensors->of(key, device, [&] {
    const HostStaging staging("reduce_partials", device);
    const PartialTerms terms = partialTerms(routes);
    return RouteTensors::Tensors{
        upload(staging, terms.begins),
        upload(staging, terms.parts),
        upload(staging, terms.rows)};
  });
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
  const Routes taken = findRoutes("pack_rows", routes);
  const at::Tensor rows =
      rowsOf("pack_rows", "x", x, taken.front()->facts.numTokens, x.device());
  const HostStaging staging("pack_rows", x.device());
  std::vector<at::Tensor> packed;
  for (const auto& route : taken) {
    const at::Tensor tokens =
        route->tensors->of({RouteTensors::Kind::kSendTokens}, x.device(), [&] {
          return RouteTensors::Tensors{upload(staging, route->sendTokens)};
        })[0];
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
  const Routes taken = findRoutes("reduce_partials", routes);
  const std::vector<at::Tensor> rows = takePartials(taken, partials, numTokens);
  const RouteTensors::Tensors lists = uploadTerms(taken, rows[0].device());
  at::Tensor out = emptyRows(rows[0], numTokens);
  kernels::ReduceRows call{
      .dtype = dtypeOf("reduce_partials", "partials", rows[0]),
      .to = mutableBytesOf(out),
      .count = static_cast<size_t>(numTokens),
      .elements = rowElements(out),
      .termBegin = wordsOf(lists[0]),
      .base = wordsOf(lists[1]),
      .index = wordsOf(lists[2])};
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
  const ScaleAndDotInputs taken =
      takeScaleAndDot(grads, values, weights, index);
  launch(
      taken.grads,
      kernels::ScaleAndDot{
          .dtype = taken.dtype,
          .scaled = mutableBytesOf(taken.scaled),
          .dots = mutableBytesOf(taken.dots),
          .grads = bytesOf(taken.grads),
          .values = bytesOf(taken.values),
          .weights = bytesOf(taken.weights),
          .index = wordsOf(taken.index),
          .count = static_cast<size_t>(taken.count),
          .elements = rowElements(taken.grads)});
  return {taken.scaled, taken.dots};
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
  const UnpermuteInputs taken =
      takeUnpermute(rows, weights, index, numTokens, topK);
  // The rows of each token, ascending; those of padding come before all tokens,
  // as their token is -1, and what is out of range after them.
  const at::Tensor tokens = taken.index.div(topK, "floor");
  const auto [sorted, order] =
      tokens.sort(/*stable=*/std::optional(true), /*dim=*/0);
  const at::Tensor order32 = order.to(at::kInt);
  const at::Tensor begins = at::searchsorted(
      sorted,
      at::arange(numTokens + 1, tokens.options()),
      /*out_int32=*/true);
  kernels::ReduceRows call{
      .dtype = taken.dtype,
      .to = mutableBytesOf(taken.out),
      .count = static_cast<size_t>(numTokens),
      .elements = rowElements(taken.out),
      .termBegin = wordsOf(begins),
      .index = wordsOf(order32),
      .weighted = taken.weights.defined()};
  call.rows.at[0] = bytesOf(taken.rows);
  call.weights.at[0] = bytesOf(taken.weights);
  launch(taken.out, call);
  return taken.out;
}

}  // namespace automoe::by_kernels
