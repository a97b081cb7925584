// SPDX-License-Identifier: Apache-2.0
// The operators of library.cpp, where shapes and dtypes are written down.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <tuple>
#include <vector>

namespace automoe {

using PlanTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using DispatchTensors = std::tuple<std::vector<at::Tensor>, at::Tensor>;
using CombineTensors = std::tuple<at::Tensor, at::Tensor>;
using WorkPointer = c10::intrusive_ptr<c10d::Work>;
/// A call under way, and what it will give.
using DispatchStarted =
    std::tuple<WorkPointer, std::vector<at::Tensor>, at::Tensor>;
using CombineStarted = std::tuple<WorkPointer, at::Tensor, at::Tensor>;

// Collective, on tensors of any device; block up to the group's timeout,
// without the GIL.

PlanTensors plan(
    const at::Tensor& topkIds,
    int64_t numExperts,
    std::string groupName,
    int64_t align,
    int64_t maxReceiveTokens,
    at::IntArrayRef reductionMap);
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

// The same without blocking, for Python: the outputs may be read once the Work
// has ended well; on a device, by what its wait() has ordered. A group that is
// not ours has ended it at the return.

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

// Of this rank alone, on the CPU.

PlanTensors planPart(
    const at::Tensor& route,
    const at::Tensor& offsets,
    int64_t part,
    int64_t numParts);
at::Tensor routeFacts(const at::Tensor& route);
at::Tensor routeReductionMap(const at::Tensor& route);
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

/// For checks in Python: raises nothing itself, but the other ranks raise
/// `fault` where they make their next call on the group.
void refuse(const std::string& groupName, const std::string& fault);

}  // namespace automoe
