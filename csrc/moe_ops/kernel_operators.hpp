// SPDX-License-Identifier: Apache-2.0
// The operators of one rank by kernels on its device, on the current stream:
// the bits of the CPU operators. Where arguments are checked by their values
// there, that would make the host wait; here an index out of range in
// `unpermute` is taken as padding.
#pragma once

#include "moe_ops/operators.hpp"

namespace automoe::by_kernels {

/// Whether they run on tensors of this device.
bool serve(c10::Device device);

std::vector<at::Tensor> packRows(const at::Tensor& x, at::TensorList routes);
/// At most kMostParts of them.
at::Tensor reducePartials(
    at::TensorList partials, at::TensorList routes, int64_t numTokens);
inline constexpr size_t kMostParts = 80;
std::tuple<at::Tensor, at::Tensor> scaleAndDot(
    const at::Tensor& grads,
    const at::Tensor& values,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index);
/// The host waits once, for R.
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

}  // namespace automoe::by_kernels
