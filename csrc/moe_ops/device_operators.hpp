// SPDX-License-Identifier: Apache-2.0
// The operators on tensors of a device: the route is on the CPU, as a plan
// gives it, all other tensors are on one device.
//
// Only `plan` and `permute` make the host wait for the device, once, as R is
// what the data says; and whatever is staged through the host. A dispatch or
// combine is staged where the ranks have found no way between their devices
// (describeDeviceGroup() says why), over groups that are not ours, and with a
// reduction_map that lets nodes send no sums.
#pragma once

#include "moe_ops/call_inputs.hpp"
#include "moe_ops/operators.hpp"

namespace automoe::on_device {

PlanTensors plan(const PlanInputs& inputs);
PlanTensors planPart(
    const at::Tensor& route,
    const at::Tensor& offsets,
    int64_t part,
    int64_t numParts);
// These return at once, or, where they are staged, once the tensors are on the
// host.
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

}  // namespace automoe::on_device
