// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/staged_operators.hpp"

#include <utility>

#include "moe_ops/device_plans.hpp"
#include "moe_ops/host_staging.hpp"
#include "moe_ops/row_calls.hpp"
#include "moe_ops/tensors.hpp"
#include "process_group/known_routes.hpp"

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

/// So that a part of this plan needs no copy from the device.
void remember(const at::Tensor& words, const at::Tensor& offsets) {
  KnownRoute route = readRoute(int32sOf(words));
  route.offsets = offsets;
  KnownRoutes::instance().add(words, std::move(route));
}

}  // namespace

PlanTensors plan(const PlanInputs& inputs) {
  HostStaging staging("plan", inputs.topkIds.device());
  PlanInputs host = inputs;
  tellingOthers(inputs.groupName, [&] {
    host.topkIds = staging.toHost("topk_ids", inputs.topkIds);
    staging.await();
  });
  const PlanTensors made = planOnHost(host);
  remember(std::get<0>(made), std::get<3>(made));
  return planOnDevice(staging, made);
}

PlanTensors planPart(
    const at::Tensor& route,
    const at::Tensor& offsets,
    int64_t part,
    int64_t numParts) {
  const c10::Device device = offsets.device();
  const at::Tensor words = int32List("plan_part", "route", route);
  const auto known = KnownRoutes::instance().find(words);
  const RouteTensors::Key key{
      RouteTensors::Kind::kPart,
      {static_cast<uint64_t>(part), static_cast<uint64_t>(numParts)}};
  const RouteTensors::Tensors tensors = known->tensors->of(key, device, [&] {
    HostStaging staging("plan_part", device);
    KnownRoute::OnHost whole{words, known->offsets};
    if (known->onHost) {
      whole = known->onHost();
    } else if (!whole.offsets.defined()) {
      whole.offsets = staging.toHost("offsets", offsets);
      staging.await();
    }
    auto [list, index, counts, ends] = planOnDevice(
        staging, automoe::planPart(whole.words, whole.offsets, part, numParts));
    return RouteTensors::Tensors{list, index, counts, ends};
  });
  return {tensors[0], tensors[1], tensors[2], tensors[3]};
}

DispatchStarted startDispatch(const DispatchInputs& inputs) {
  HostStaging staging("dispatch", inputs.xs[0].device());
  DispatchInputs host = inputs;
  tellingOthers(inputs.groupName, [&] {
    host.xs = staging.toHost("x", inputs.xs);
    host.topkWeights = staging.toHost("topk_weights", inputs.topkWeights);
    host.receiveIndex = staging.toHost("receive_index", inputs.receiveIndex);
    staging.await();
  });
  auto [work, from, fromWeights] = automoe::startDispatch(host);
  std::vector<at::Tensor> received;
  for (const at::Tensor& tensor : from) {
    received.push_back(staging.emptyOnDevice(tensor));
  }
  at::Tensor receivedWeights = staging.emptyOnDevice(fromWeights);
  std::vector<at::Tensor> to = received;
  from.push_back(std::move(fromWeights));
  to.push_back(receivedWeights);
  return {
      c10::make_intrusive<StagedWork>(
          std::move(work), std::move(from), std::move(to)),
      std::move(received),
      std::move(receivedWeights)};
}

CombineStarted startCombine(const CombineInputs& inputs) {
  HostStaging staging("combine", inputs.rows.device());
  CombineInputs host = inputs;
  tellingOthers(inputs.groupName, [&] {
    host.rows = staging.toHost("rows", inputs.rows);
    host.weights = staging.toHost("weights", inputs.weights);
    host.scalars = staging.toHost("scalars", inputs.scalars);
    host.receiveIndex = staging.toHost("receive_index", inputs.receiveIndex);
    staging.await();
  });
  auto [work, fromOut, fromScalars] = automoe::startCombine(host);
  at::Tensor out = staging.emptyOnDevice(fromOut);
  at::Tensor scalarsOut = staging.emptyOnDevice(fromScalars);
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
