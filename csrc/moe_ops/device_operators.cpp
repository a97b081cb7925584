// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/device_operators.hpp"

#include <ATen/core/LegacyTypeDispatch.h>

#include <utility>

#include "moe_ops/device_plans.hpp"
#include "moe_ops/device_row_exchange.hpp"
#include "moe_ops/kernel_operators.hpp"
#include "moe_ops/row_calls.hpp"
#include "moe_ops/staged_operators.hpp"
#include "moe_ops/tensors.hpp"

namespace automoe::on_device {
namespace {

/// Runs an operator: without the GIL, and without what tracks gradients and
/// changes of tensors, as that is for the operator as a whole.
template <typename Body>
auto run(Body&& body) {
  const ReleaseGil noGil;
  const at::AutoDispatchBelowADInplaceOrView below;
  return withTorchErrors(std::forward<Body>(body));
}

}  // namespace

PlanTensors plan(const PlanInputs& inputs) {
  return run([&] {
    std::optional<PlanTensors> made = planOnDevices(inputs);
    return made.has_value() ? *std::move(made) : staged::plan(inputs);
  });
}

PlanTensors planPart(
    const at::Tensor& route,
    const at::Tensor& offsets,
    int64_t part,
    int64_t numParts) {
  return run([&] { return staged::planPart(route, offsets, part, numParts); });
}

DispatchStarted startDispatch(const DispatchInputs& inputs) {
  return run([&] {
    const auto exchange = findDeviceExchange(
        inputs.groupName, inputs.xs[0].device(), inputs.route);
    return exchange == nullptr ? staged::startDispatch(inputs)
                               : automoe::startDispatch(*exchange, inputs);
  });
}

CombineStarted startCombine(const CombineInputs& inputs) {
  return run([&] {
    const auto exchange = findDeviceExchange(
        inputs.groupName, inputs.rows.device(), inputs.route);
    return exchange == nullptr ? staged::startCombine(inputs)
                               : automoe::startCombine(*exchange, inputs);
  });
}

std::vector<at::Tensor> packRows(const at::Tensor& x, at::TensorList routes) {
  return run([&] {
    return by_kernels::serve(x.device()) ? by_kernels::packRows(x, routes)
                                         : staged::packRows(x, routes);
  });
}

at::Tensor reducePartials(
    at::TensorList partials, at::TensorList routes, int64_t numTokens) {
  return run([&] {
    return by_kernels::serve(partials[0].device()) &&
                   partials.size() <= by_kernels::kMostParts
               ? by_kernels::reducePartials(partials, routes, numTokens)
               : staged::reducePartials(partials, routes, numTokens);
  });
}

std::tuple<at::Tensor, at::Tensor> scaleAndDot(
    const at::Tensor& grads,
    const at::Tensor& values,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index) {
  return run([&] {
    return by_kernels::serve(grads.device())
               ? by_kernels::scaleAndDot(grads, values, weights, index)
               : staged::scaleAndDot(grads, values, weights, index);
  });
}

PlanTensors permute(
    const at::Tensor& x,
    const at::Tensor& topkIds,
    int64_t numExperts,
    int64_t align) {
  return run([&] {
    return by_kernels::serve(x.device())
               ? by_kernels::permute(x, topkIds, numExperts, align)
               : staged::permute(x, topkIds, numExperts, align);
  });
}

at::Tensor unpermute(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index,
    int64_t numTokens,
    int64_t topK) {
  return run([&] {
    return by_kernels::serve(rows.device())
               ? by_kernels::unpermute(rows, weights, index, numTokens, topK)
               : staged::unpermute(rows, weights, index, numTokens, topK);
  });
}

}  // namespace automoe::on_device
