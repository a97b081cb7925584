// SPDX-License-Identifier: Apache-2.0
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>

#include <limits>
#include <utility>

#include "moe_ops/device_operators.hpp"
#include "moe_ops/operators.hpp"
#include "moe_ops/row_calls.hpp"
#include "moe_ops/row_exchange.hpp"
#include "moe_ops/tensors.hpp"
#include "process_group/exchange/plan_arguments.hpp"

namespace automoe {
namespace {

const char* scalarTypeName(uint8_t dtype) {
  return c10::toString(static_cast<c10::ScalarType>(dtype));
}

std::vector<int32_t> checkedMap(at::IntArrayRef map) {
  std::vector<int32_t> labels;
  for (const int64_t label : map) {
    TORCH_CHECK_VALUE(
        label >= 0 && label <= std::numeric_limits<int32_t>::max(),
        "plan: reduction_map[",
        labels.size(),
        "] is ",
        label,
        ", expected a label of at least 0");
    labels.push_back(static_cast<int32_t>(label));
  }
  return labels;
}

struct DispatchCall {
  DispatchArguments arguments;
  CallTensors tensors;
  DispatchTensors results;
};

/// Checks the route and its index and keeps them.
RouteFacts takeRoute(
    const char* call,
    RowExchange& exchange,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    CallTensors& tensors) {
  const at::Tensor words = int32List(call, "route", route);
  const RouteFacts facts = exchange.takeRoute(words);
  tensors.inputs.push_back(words);
  tensors.inputs.push_back(int32List(
      call,
      "receive_index",
      receiveIndex,
      facts.numReceiveRows,
      exchange.device()));
  return facts;
}

DispatchCall makeDispatch(RowExchange& exchange, const DispatchInputs& inputs) {
  constexpr const char* kCall = "dispatch";
  TORCH_CHECK_VALUE(
      !inputs.xs.empty(),
      "dispatch: xs is empty, expected at least one tensor");
  DispatchCall call;
  auto& [arguments, tensors, results] = call;
  auto& [received, receivedWeights] = results;
  const RouteFacts facts =
      takeRoute(kCall, exchange, inputs.route, inputs.receiveIndex, tensors);
  const int64_t numRows = inputs.packed ? facts.numSendRows : facts.numTokens;
  arguments.route = int32sOf(tensors.inputs[0]);
  arguments.receiveIndex = int32sOf(tensors.inputs[1]);
  arguments.packed = inputs.packed;
  arguments.dtype = static_cast<uint8_t>(inputs.xs[0].scalar_type());
  arguments.dtypeName = &scalarTypeName;
  for (const at::Tensor& x : inputs.xs) {
    const at::Tensor rows = rowsOf(kCall, "x", x, numRows, exchange.device());
    received.push_back(emptyRows(rows, facts.numReceiveRows));
    arguments.fields.push_back(
        {bytesOf(rows),
         mutableBytesOf(received.back()),
         rowBytes(rows),
         static_cast<uint8_t>(x.scalar_type()),
         numberOf(x.scalar_type())});
    tensors.inputs.push_back(rows);
  }
  tensors.outputs = received;
  if (inputs.topkWeights.has_value()) {
    const at::Tensor weights = floats(
        kCall,
        "topk_weights",
        *inputs.topkWeights,
        {facts.numTokens, facts.topK},
        exchange.device());
    receivedWeights = emptyList(
        facts.numReceiveRows, weights.scalar_type(), exchange.device());
    arguments.weights = bytesOf(weights);
    arguments.receivedWeights = mutableBytesOf(receivedWeights);
    arguments.weightBytes = static_cast<uint32_t>(weights.element_size());
    tensors.inputs.push_back(weights);
    tensors.outputs.push_back(receivedWeights);
  } else {
    receivedWeights = emptyList(0, at::kFloat, exchange.device());
  }
  return call;
}

struct CombineCall {
  CombineArguments arguments;
  CallTensors tensors;
  CombineTensors results;
};

CombineCall makeCombine(RowExchange& exchange, const CombineInputs& inputs) {
  constexpr const char* kCall = "combine";
  CombineCall call;
  auto& [arguments, tensors, results] = call;
  auto& [out, scalarsOut] = results;
  const bool packed = inputs.packed;
  const RouteFacts facts =
      takeRoute(kCall, exchange, inputs.route, inputs.receiveIndex, tensors);
  TORCH_CHECK_VALUE(
      (inputs.numTokens == -1 || inputs.numTokens == facts.numTokens) &&
          (inputs.topK == -1 || inputs.topK == facts.topK),
      "combine: num_tokens and topk are ",
      inputs.numTokens,
      " and ",
      inputs.topK,
      ", expected those of the plan, ",
      facts.numTokens,
      " and ",
      facts.topK,
      ", or -1");
  TORCH_CHECK_VALUE(
      !packed || facts.sumsPerNode,
      "combine: packed is True, but the plan's reduction_map allows no sums "
      "of one node; plan without reduction_map, or combine without packed");
  const c10::Device device = exchange.device();
  const int64_t numRows = facts.numReceiveRows;
  const at::Tensor terms = rowsOf(kCall, "rows", inputs.rows, numRows, device);
  const kernels::DType dtype = dtypeOf(kCall, "rows", terms);
  const at::Tensor factors =
      sumValues(kCall, "weights", inputs.weights, dtype, numRows, device);
  const at::Tensor values =
      sumValues(kCall, "scalars", inputs.scalars, dtype, numRows, device);
  out = emptyRows(terms, packed ? facts.numSendRows : facts.numTokens);
  tensors.outputs.push_back(out);
  const at::ScalarType sumType = sumTypeOf(dtype);
  if (values.defined()) {
    scalarsOut = at::empty(
        {facts.numTokens, facts.topK},
        at::TensorOptions(sumType).device(device));
    tensors.outputs.push_back(scalarsOut);
  } else {
    scalarsOut = emptyList(0, sumType, device);
  }
  arguments.route = int32sOf(tensors.inputs[0]);
  arguments.receiveIndex = int32sOf(tensors.inputs[1]);
  arguments.dtype = dtype;
  arguments.elements = rowElements(terms);
  arguments.rows = bytesOf(terms);
  arguments.weighted = factors.defined();
  arguments.weights = bytesOf(factors);
  arguments.withScalars = values.defined();
  arguments.scalars = bytesOf(values);
  arguments.out = mutableBytesOf(out);
  arguments.scalarsOut =
      values.defined() ? mutableBytesOf(scalarsOut) : nullptr;
  arguments.packed = packed;
  for (const at::Tensor& tensor : {terms, factors, values}) {
    if (tensor.defined()) {
      tensors.inputs.push_back(tensor);
    }
  }
  return call;
}

}  // namespace

// ---- whatever carries the rows ----

DispatchStarted startDispatch(
    RowExchange& exchange, const DispatchInputs& inputs) {
  DispatchCall call = checked(exchange, OperationKind::kDispatch, [&] {
    return makeDispatch(exchange, inputs);
  });
  auto work =
      exchange.dispatch(std::move(call.arguments), std::move(call.tensors));
  auto& [received, receivedWeights] = call.results;
  return {std::move(work), std::move(received), std::move(receivedWeights)};
}

CombineStarted startCombine(
    RowExchange& exchange, const CombineInputs& inputs) {
  CombineCall call = checked(exchange, OperationKind::kCombine, [&] {
    return makeCombine(exchange, inputs);
  });
  auto work =
      exchange.combine(std::move(call.arguments), std::move(call.tensors));
  auto& [out, scalarsOut] = call.results;
  return {std::move(work), std::move(out), std::move(scalarsOut)};
}

PlanTensors planOnHost(const PlanInputs& inputs) {
  const auto exchange = findRowExchange(inputs.groupName);
  at::Tensor narrow;
  const auto builder = checked(*exchange, OperationKind::kPlan, [&] {
    const at::Tensor ids = checkedIds("plan", inputs.topkIds);
    // What does not fit is found below; then these values are not used.
    narrow = ids.to(at::kInt);
    const PlanArguments arguments{
        int32sOf(narrow),
        ids.size(0),
        ids.size(1),
        inputs.numExperts,
        inputs.align,
        inputs.maxReceiveTokens,
        checkedMap(inputs.reductionMap)};
    checkPlanArguments(arguments);
    const std::string wrong = findIllegalId("plan", ids, inputs.numExperts);
    TORCH_CHECK_VALUE(wrong.empty(), wrong);
    return std::make_shared<RouteBuilder>(exchange->topology(), arguments);
  });
  exchange->plan(builder, {{narrow}, {}});
  return toTensors(builder->finish());
}

// ---- by the device ----

DispatchStarted startDispatch(const DispatchInputs& inputs) {
  return withTorchErrors([&] {
    return inputs.xs.empty() || inputs.xs[0].is_cpu()
               ? startDispatch(*findRowExchange(inputs.groupName), inputs)
               : on_device::startDispatch(inputs);
  });
}

CombineStarted startCombine(const CombineInputs& inputs) {
  return withTorchErrors([&] {
    return inputs.rows.is_cpu()
               ? startCombine(*findRowExchange(inputs.groupName), inputs)
               : on_device::startCombine(inputs);
  });
}

// ---- the operators ----

PlanTensors plan(
    const at::Tensor& topkIds,
    int64_t numExperts,
    std::string groupName,
    int64_t align,
    int64_t maxReceiveTokens,
    at::IntArrayRef reductionMap) {
  const ReleaseGil noGil;
  const PlanInputs inputs{
      topkIds,
      numExperts,
      std::move(groupName),
      align,
      maxReceiveTokens,
      reductionMap.vec()};
  return withTorchErrors([&] {
    return topkIds.is_cpu() ? planOnHost(inputs) : on_device::plan(inputs);
  });
}

DispatchTensors dispatch(
    at::TensorList xs,
    const std::optional<at::Tensor>& topkWeights,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    std::string groupName,
    bool packed) {
  const ReleaseGil noGil;
  auto [work, received, receivedWeights] = startDispatch(
      {xs.vec(),
       topkWeights,
       route,
       receiveIndex,
       std::move(groupName),
       packed});
  withTorchErrors([&] { work->wait(); });
  return {std::move(received), std::move(receivedWeights)};
}

CombineTensors combine(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& scalars,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    std::string groupName,
    int64_t numTokens,
    int64_t topK,
    bool packed) {
  const ReleaseGil noGil;
  auto [work, out, scalarsOut] = startCombine(
      {rows,
       weights,
       scalars,
       route,
       receiveIndex,
       std::move(groupName),
       numTokens,
       topK,
       packed});
  withTorchErrors([&] { work->wait(); });
  return {std::move(out), std::move(scalarsOut)};
}

DispatchStarted dispatchAsync(
    const std::vector<at::Tensor>& xs,
    const std::optional<at::Tensor>& topkWeights,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    const std::string& groupName,
    bool packed) {
  return startDispatch(
      {xs, topkWeights, route, receiveIndex, groupName, packed});
}

CombineStarted combineAsync(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& scalars,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    const std::string& groupName,
    int64_t numTokens,
    int64_t topK,
    bool packed) {
  return startCombine(
      {rows,
       weights,
       scalars,
       route,
       receiveIndex,
       groupName,
       numTokens,
       topK,
       packed});
}

void refuse(const std::string& groupName, const std::string& fault) {
  withTorchErrors([&] {
    const auto exchange = findRowExchange(groupName);
    // A fault is looked at before the kind of call.
    exchange->refuse(
        OperationKind::kDispatch,
        concat("rank ", exchange->topology().rank(), ": ", fault));
  });
}

}  // namespace automoe
