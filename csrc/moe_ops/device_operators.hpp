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

#include "moe_ops/operators.hpp"

namespace automoe::on_device {

PlanTensors plan(
    const at::Tensor& topkIds,
    int64_t numExperts,
    std::string groupName,
    int64_t align,
    int64_t maxReceiveTokens,
    at::IntArrayRef reductionMap);
PlanTensors planPart(
    const at::Tensor& route,
    const at::Tensor& offsets,
    int64_t part,
    int64_t numParts);
DispatchTensors dispatch(
    at::TensorList xs,
    const std::optional<at::Tensor>& topkWeights,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    std::string groupName,
    bool packed);
CombineTensors combine(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& scalars,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    std::string groupName,
    int64_t numTokens,
    int64_t topK,
    bool packed);
DispatchStarted dispatchAsync(
    const std::vector<at::Tensor>& xs,
    const std::optional<at::Tensor>& topkWeights,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    const std::string& groupName,
    bool packed);
CombineStarted combineAsync(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& scalars,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    const std::string& groupName,
    int64_t numTokens,
    int64_t topK,
    bool packed);
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
