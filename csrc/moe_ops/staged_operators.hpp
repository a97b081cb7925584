// SPDX-License-Identifier: Apache-2.0
// The operators of device_operators.hpp, staged through the host: its tensors
// are copied there, the CPU operator runs, and what it gives is copied back.
#pragma once

#include "moe_ops/call_inputs.hpp"
#include "moe_ops/operators.hpp"

namespace automoe::staged {

PlanTensors plan(const PlanInputs& inputs);
PlanTensors planPart(
    const at::Tensor& route,
    const at::Tensor& offsets,
    int64_t part,
    int64_t numParts);
DispatchStarted startDispatch(const DispatchInputs& inputs);
CombineStarted startCombine(const CombineInputs& inputs);
std::vector<at::Tensor> packRows(const at::Tensor& x, at::TensorList routes);
at::Tensor reducePartials(
    at::TensorList partials, at::TensorList routes, int64_t numTokens);
std::tuple<at::Tensor, at::Tensor> scaleAndDot(
    const at::Tensor& grads,
    const at::Tensor& values,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index);
PlanTensors permute(
    const at::Tensor& x,
    const at::Tensor& topkIds,
    int64_t numExperts,
    int64_t align);
at::Tensor unpermute(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index,
    int64_t numTokens,
    int64_t topK);

}  // namespace automoe::staged
