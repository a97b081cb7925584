// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/staged_operators.hpp"

#include <utility>

#include "moe_ops/host_staging.hpp"
#include "moe_ops/recent_plans.hpp"
#include "moe_ops/tensors.hpp"

namespace automoe::staged {
namespace {

/// What `make` returns. What it refuses, the other ranks of the group hear of.
template <typename Make>
auto tellingOthers(const std::string& groupName, const Make& make) {
  try {
    return make();
  } catch (const c10::Error& error) {
    refuse(groupName, error.what_without_backtrace());
    throw;
  }
}

/// The arguments of a call on the host.
struct HostDispatch {
  HostStaging staging;
  std::vector<at::Tensor> xs;
  std::optional<at::Tensor> weights;
  at::Tensor receiveIndex;
};

HostDispatch copyDispatch(
    at::TensorList xs,
    const std::optional<at::Tensor>& topkWeights,
    const at::Tensor& receiveIndex,
    const std::string& groupName) {
  return tellingOthers(groupName, [&] {
    HostStaging staging("dispatch", xs[0].device());
    std::vector<at::Tensor> hostXs = staging.toHost("x", xs);
    std::optional<at::Tensor> weights =
        staging.toHost("topk_weights", topkWeights);
    at::Tensor index = staging.toHost("receive_index", receiveIndex);
    staging.await();
    return HostDispatch{
        staging, std::move(hostXs), std::move(weights), std::move(index)};
  });
}

struct HostCombine {
  HostStaging staging;
  at::Tensor rows;
  std::optional<at::Tensor> weights;
  std::optional<at::Tensor> scalars;
  at::Tensor receiveIndex;
};

HostCombine copyCombine(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& scalars,
    const at::Tensor& receiveIndex,
    const std::string& groupName) {
  return tellingOthers(groupName, [&] {
    HostStaging staging("combine", rows.device());
    at::Tensor hostRows = staging.toHost("rows", rows);
    std::optional<at::Tensor> hostWeights = staging.toHost("weights", weights);
    std::optional<at::Tensor> hostScalars = staging.toHost("scalars", scalars);
    at::Tensor index = staging.toHost("receive_index", receiveIndex);
    staging.await();
    return HostCombine{
        staging,
        std::move(hostRows),
        std::move(hostWeights),
        std::move(hostScalars),
        std::move(index)};
  });
}

/// All but the route go to the device.
PlanTensors planOnDevice(const HostStaging& staging, const PlanTensors& host) {
  const auto& [route, receiveIndex, counts, offsets] = host;
  return {
      route,
      staging.toDevice(receiveIndex),
      staging.toDevice(counts),
      staging.toDevice(offsets)};
}

std::vector<at::Tensor> allToDevice(
    const HostStaging& staging, const std::vector<at::Tensor>& host) {
  std::vector<at::Tensor> tensors;
  for (const at::Tensor& tensor : host) {
    tensors.push_back(staging.toDevice(tensor));
  }
  return tensors;
}

}  // namespace

PlanTensors plan(
    const at::Tensor& topkIds,
    int64_t numExperts,
    const std::string& groupName,
    int64_t align,
    int64_t maxReceiveTokens,
    at::IntArrayRef reductionMap) {
  HostStaging staging("plan", topkIds.device());
  const at::Tensor ids = tellingOthers(groupName, [&] {
    at::Tensor host = staging.toHost("topk_ids", topkIds);
    staging.await();
    return host;
  });
  const PlanTensors host = automoe::plan(
      ids, numExperts, groupName, align, maxReceiveTokens, reductionMap);
  RecentPlans::instance().add(std::get<0>(host), std::get<3>(host));
  return planOnDevice(staging, host);
}

PlanTensors planPart(
    const at::Tensor& route,
    const at::Tensor& offsets,
    int64_t part,
    int64_t numParts) {
  HostStaging staging("plan_part", offsets.device());
  const at::Tensor words = int32List("plan_part", "route", route);
  at::Tensor ends = RecentPlans::instance().offsetsOf(words);
  if (!ends.defined()) {
    ends = staging.toHost("offsets", offsets);
    staging.await();
  }
  return planOnDevice(staging, automoe::planPart(words, ends, part, numParts));
}

DispatchTensors dispatch(
    at::TensorList xs,
    const std::optional<at::Tensor>& topkWeights,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    const std::string& groupName,
    bool packed) {
  const HostDispatch host =
      copyDispatch(xs, topkWeights, receiveIndex, groupName);
  const auto [received, receivedWeights] = automoe::dispatch(
      host.xs, host.weights, route, host.receiveIndex, groupName, packed);
  return {
      allToDevice(host.staging, received),
      host.staging.toDevice(receivedWeights)};
}

CombineTensors combine(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& scalars,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    const std::string& groupName,
    int64_t numTokens,
    int64_t topK,
    bool packed) {
  const HostCombine host =
      copyCombine(rows, weights, scalars, receiveIndex, groupName);
  const auto [out, scalarsOut] = automoe::combine(
      host.rows,
      host.weights,
      host.scalars,
      route,
      host.receiveIndex,
      groupName,
      numTokens,
      topK,
      packed);
  return {host.staging.toDevice(out), host.staging.toDevice(scalarsOut)};
}

DispatchStarted dispatchAsync(
    at::TensorList xs,
    const std::optional<at::Tensor>& topkWeights,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    const std::string& groupName,
    bool packed) {
  const HostDispatch host =
      copyDispatch(xs, topkWeights, receiveIndex, groupName);
  auto [work, from, fromWeights] = automoe::dispatchAsync(
      host.xs, host.weights, route, host.receiveIndex, groupName, packed);
  std::vector<at::Tensor> received;
  for (const at::Tensor& tensor : from) {
    received.push_back(host.staging.emptyOnDevice(tensor));
  }
  at::Tensor receivedWeights = host.staging.emptyOnDevice(fromWeights);
  std::vector<at::Tensor> to = received;
  from.push_back(std::move(fromWeights));
  to.push_back(receivedWeights);
  return {
      c10::make_intrusive<StagedWork>(
          std::move(work), std::move(from), std::move(to)),
      std::move(received),
      std::move(receivedWeights)};
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
  const HostCombine host =
      copyCombine(rows, weights, scalars, receiveIndex, groupName);
  auto [work, fromOut, fromScalars] = automoe::combineAsync(
      host.rows,
      host.weights,
      host.scalars,
      route,
      host.receiveIndex,
      groupName,
      numTokens,
      topK,
      packed);
  at::Tensor out = host.staging.emptyOnDevice(fromOut);
  at::Tensor scalarsOut = host.staging.emptyOnDevice(fromScalars);
  return {
      c10::make_intrusive<StagedWork>(
          std::move(work),
          std::vector{std::move(fromOut), std::move(fromScalars)},
          std::vector{out, scalarsOut}),
      std::move(out),
      std::move(scalarsOut)};
}

std::vector<at::Tensor> packRows(const at::Tensor& x, at::TensorList routes) {
  HostStaging staging("pack_rows", x.device());
  const at::Tensor host = staging.toHost("x", x);
  staging.await();
  return allToDevice(staging, automoe::packRows(host, routes));
}

at::Tensor reducePartials(
    at::TensorList partials, at::TensorList routes, int64_t numTokens) {
  HostStaging staging("reduce_partials", partials[0].device());
  const std::vector<at::Tensor> host = staging.toHost("partials", partials);
  staging.await();
  return staging.toDevice(automoe::reducePartials(host, routes, numTokens));
}

std::tuple<at::Tensor, at::Tensor> scaleAndDot(
    const at::Tensor& grads,
    const at::Tensor& values,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index) {
  HostStaging staging("scale_and_dot", grads.device());
  const at::Tensor hostGrads = staging.toHost("grads", grads);
  const at::Tensor hostValues = staging.toHost("values", values);
  const std::optional<at::Tensor> hostWeights =
      staging.toHost("weights", weights);
  const at::Tensor hostIndex = staging.toHost("index", index);
  staging.await();
  const auto [scaled, dots] =
      automoe::scaleAndDot(hostGrads, hostValues, hostWeights, hostIndex);
  return {staging.toDevice(scaled), staging.toDevice(dots)};
}

PlanTensors permute(
    const at::Tensor& x,
    const at::Tensor& topkIds,
    int64_t numExperts,
    int64_t align) {
  HostStaging staging("permute", x.device());
  const at::Tensor hostX = staging.toHost("x", x);
  const at::Tensor ids = staging.toHost("topk_ids", topkIds);
  staging.await();
  const auto [rows, index, counts, ends] =
      automoe::permute(hostX, ids, numExperts, align);
  return {
      staging.toDevice(rows),
      staging.toDevice(index),
      staging.toDevice(counts),
      staging.toDevice(ends)};
}

at::Tensor unpermute(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index,
    int64_t numTokens,
    int64_t topK) {
  HostStaging staging("unpermute", rows.device());
  const at::Tensor hostRows = staging.toHost("rows", rows);
  const std::optional<at::Tensor> hostWeights =
      staging.toHost("weights", weights);
  const at::Tensor hostIndex = staging.toHost("index", index);
  staging.await();
  return staging.toDevice(
      automoe::unpermute(hostRows, hostWeights, hostIndex, numTokens, topK));
}

}  // namespace automoe::staged
