// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/local_inputs.hpp"

#include "moe_ops/tensors.hpp"

namespace automoe {

ScaleAndDotInputs takeScaleAndDot(
    const at::Tensor& grads,
    const at::Tensor& values,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index) {
  constexpr const char* kCall = "scale_and_dot";
  const c10::Device device = grads.device();
  ScaleAndDotInputs taken;
  taken.grads = rowsOf(kCall, "grads", grads, -1, device);
  taken.dtype = dtypeOf(kCall, "grads", taken.grads);
  taken.count = taken.grads.size(0);
  taken.values = floats(kCall, "values", values, taken.grads.sizes(), device);
  TORCH_CHECK_VALUE(
      taken.values.scalar_type() == taken.grads.scalar_type(),
      "scale_and_dot: values is ",
      taken.values.scalar_type(),
      ", expected the dtype of grads, ",
      taken.grads.scalar_type());
  taken.weights =
      sumValues(kCall, "weights", weights, taken.dtype, taken.count, device);
  taken.index = int32List(kCall, "index", index, taken.count, device);
  taken.scaled = emptyRows(taken.grads, taken.count);
  taken.dots = emptyList(taken.count, sumTypeOf(taken.dtype), device);
  return taken;
}

UnpermuteInputs takeUnpermute(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index,
    int64_t numTokens,
    int64_t topK) {
  constexpr const char* kCall = "unpermute";
  TORCH_CHECK_VALUE(
      numTokens >= 0 && topK >= 1,
      "unpermute: num_tokens and topk are ",
      numTokens,
      " and ",
      topK,
      ", expected at least 0 and at least 1");
  const c10::Device device = rows.device();
  UnpermuteInputs taken;
  taken.index = int32List(kCall, "index", index, -1, device);
  const int64_t count = taken.index.numel();
  taken.rows = rowsOf(kCall, "rows", rows, count, device);
  taken.dtype = dtypeOf(kCall, "rows", taken.rows);
  taken.weights =
      sumValues(kCall, "weights", weights, taken.dtype, count, device);
  taken.out = emptyRows(taken.rows, numTokens);
  return taken;
}

}  // namespace automoe
