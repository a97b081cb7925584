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

/// Checks the route and its index and keeps them; returns a view.
Route takeRoute(
    const char* call,
    const RowExchange& exchange,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    CallTensors& tensors) {
  const at::Tensor words = int32List(call, "route", route);
  const Route view(int32sOf(words));
  exchange.checkRoute(view);
  tensors.inputs.push_back(words);
  tensors.inputs.push_back(int32List(
      call,
      "receive_index",
      receiveIndex,
      view.numReceiveRows(),
      exchange.device()));
  return view;
}

DispatchCall makeDispatch(
    const RowExchange& exchange,
    at::TensorList xs,
    const std::optional<at::Tensor>& topkWeights,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    bool packed) {
  constexpr const char* kCall = "dispatch";
  TORCH_CHECK_VALUE(
      !xs.empty(), "dispatch: xs is empty, expected at least one tensor");
  DispatchCall call;
  auto& [arguments, tensors, results] = call;
  auto& [received, receivedWeights] = results;
  const Route view = takeRoute(kCall, exchange, route, receiveIndex, tensors);
  const int64_t numRows =
      packed ? static_cast<int64_t>(view.numSendRows()) : view.numTokens();
  arguments.route = int32sOf(tensors.inputs[0]);
  arguments.receiveIndex = int32sOf(tensors.inputs[1]);
  arguments.packed = packed;
  arguments.dtype = static_cast<uint8_t>(xs[0].scalar_type());
  arguments.dtypeName = &scalarTypeName;
  for (const at::Tensor& x : xs) {
    const at::Tensor rows = rowsOf(kCall, "x", x, numRows, exchange.device());
    received.push_back(emptyRows(rows, view.numReceiveRows()));
    arguments.fields.push_back(
        {bytesOf(rows),
         mutableBytesOf(received.back()),
         rowBytes(rows),
         static_cast<uint8_t>(x.scalar_type())});
    tensors.inputs.push_back(rows);
  }
  tensors.outputs = received;
  if (topkWeights.has_value()) {
    const at::Tensor weights = floats(
        kCall,
        "topk_weights",
        *topkWeights,
        {view.numTokens(), view.topK()},
        exchange.device());
    receivedWeights = emptyList(
        view.numReceiveRows(), weights.scalar_type(), exchange.device());
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

CombineCall makeCombine(
    const RowExchange& exchange,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& scalars,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    int64_t numTokens,
    int64_t topK,
    bool packed) {
  constexpr const char* kCall = "combine";
  CombineCall call;
  auto& [arguments, tensors, results] = call;
  auto& [out, scalarsOut] = results;
  const Route view = takeRoute(kCall, exchange, route, receiveIndex, tensors);
  TORCH_CHECK_VALUE(
      (numTokens == -1 || numTokens == view.numTokens()) &&
          (topK == -1 || topK == view.topK()),
      "combine: num_tokens and topk are ",
      numTokens,
      " and ",
      topK,
      ", expected those of the plan, ",
      view.numTokens(),
      " and ",
      view.topK(),
      ", or -1");
  TORCH_CHECK_VALUE(
      !packed || view.sumsPerNode(),
      "combine: packed is True, but the plan's reduction_map allows no sums "
      "of one node; plan without reduction_map, or combine without packed");
  const c10::Device device = exchange.device();
  const int64_t numRows = view.numReceiveRows();
  const at::Tensor terms = rowsOf(kCall, "rows", rows, numRows, device);
  arguments.dtype = dtypeOf(kCall, "rows", terms);
  const at::Tensor factors =
      sumValues(kCall, "weights", weights, arguments.dtype, numRows, device);
  const at::Tensor values =
      sumValues(kCall, "scalars", scalars, arguments.dtype, numRows, device);
  out = emptyRows(
      terms,
      packed ? static_cast<int64_t>(view.numSendRows()) : view.numTokens());
  tensors.outputs.push_back(out);
  const at::ScalarType sumType = sumTypeOf(arguments.dtype);
  if (values.defined()) {
    scalarsOut = at::empty(
        {view.numTokens(), view.topK()},
        at::TensorOptions(sumType).device(device));
    tensors.outputs.push_back(scalarsOut);
  } else {
    scalarsOut = emptyList(0, sumType, device);
  }
  arguments.route = int32sOf(tensors.inputs[0]);
  arguments.receiveIndex = int32sOf(tensors.inputs[1]);
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

DispatchStarted startDispatch(
    RowExchange& exchange,
    at::TensorList xs,
    const std::optional<at::Tensor>& topkWeights,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    bool packed) {
  DispatchCall call = checked(exchange, OperationKind::kDispatch, [&] {
    return makeDispatch(exchange, xs, topkWeights, route, receiveIndex, packed);
  });
  auto work =
      exchange.dispatch(std::move(call.arguments), std::move(call.tensors));
  auto& [received, receivedWeights] = call.results;
  return {std::move(work), std::move(received), std::move(receivedWeights)};
}

CombineStarted startCombine(
    RowExchange& exchange,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& scalars,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    int64_t numTokens,
    int64_t topK,
    bool packed) {
  CombineCall call = checked(exchange, OperationKind::kCombine, [&] {
    return makeCombine(
        exchange,
        rows,
        weights,
        scalars,
        route,
        receiveIndex,
        numTokens,
        topK,
        packed);
  });
  auto work =
      exchange.combine(std::move(call.arguments), std::move(call.tensors));
  auto& [out, scalarsOut] = call.results;
  return {std::move(work), std::move(out), std::move(scalarsOut)};
}

PlanTensors plan(
    const at::Tensor& topkIds,
    int64_t numExperts,
    std::string groupName,
    int64_t align,
    int64_t maxReceiveTokens,
    at::IntArrayRef reductionMap) {
  const ReleaseGil noGil;
  return withTorchErrors([&] {
    const auto exchange = findRowExchange(groupName);
    at::Tensor narrow;
    const auto builder = checked(*exchange, OperationKind::kPlan, [&] {
      const at::Tensor ids = checkedIds("plan", topkIds);
      // What does not fit is found below; then these values are not used.
      narrow = ids.to(at::kInt);
      const PlanArguments arguments{
          int32sOf(narrow),
          ids.size(0),
          ids.size(1),
          numExperts,
          align,
          maxReceiveTokens,
          checkedMap(reductionMap)};
      checkPlanArguments(arguments);
      const std::string wrong = findIllegalId("plan", ids, numExperts);
      TORCH_CHECK_VALUE(wrong.empty(), wrong);
      return std::make_shared<RouteBuilder>(exchange->topology(), arguments);
    });
    exchange->plan(builder, {{narrow}, {}});
    return toTensors(builder->finish());
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
  return withTorchErrors([&] {
    auto [work, received, receivedWeights] = startDispatch(
        *findRowExchange(groupName),
        xs,
        topkWeights,
        route,
        receiveIndex,
        packed);
    work->wait();
    return DispatchTensors(std::move(received), std::move(receivedWeights));
  });
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
  return withTorchErrors([&] {
    auto [work, out, scalarsOut] = startCombine(
        *findRowExchange(groupName),
        rows,
        weights,
        scalars,
        route,
        receiveIndex,
        numTokens,
        topK,
        packed);
    work->wait();
    return CombineTensors(std::move(out), std::move(scalarsOut));
  });
}

DispatchStarted dispatchAsync(
    const std::vector<at::Tensor>& xs,
    const std::optional<at::Tensor>& topkWeights,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    const std::string& groupName,
    bool packed) {
  return withTorchErrors([&] {
    if (!xs.empty() && !xs[0].is_cpu()) {
      return on_device::dispatchAsync(
          xs, topkWeights, route, receiveIndex, groupName, packed);
    }
    return startDispatch(
        *findRowExchange(groupName),
        xs,
        topkWeights,
        route,
        receiveIndex,
        packed);
  });
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
  return withTorchErrors([&] {
    if (!rows.is_cpu()) {
      return on_device::combineAsync(
          rows,
          weights,
          scalars,
          route,
          receiveIndex,
          groupName,
          numTokens,
          topK,
          packed);
    }
    return startCombine(
        *findRowExchange(groupName),
        rows,
        weights,
        scalars,
        route,
        receiveIndex,
        numTokens,
        topK,
        packed);
  });
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
