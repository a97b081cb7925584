// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/device_plans.hpp"

#include <ATen/ops/clamp.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "moe_ops/row_exchange.hpp"
#include "moe_ops/tensors.hpp"
#include "process_group/device_groups.hpp"
#include "process_group/exchange/plan_arguments.hpp"
#include "process_group/exchange/route_experts.hpp"
#include "process_group/known_routes.hpp"
#include "process_group/work_device.hpp"

namespace automoe {
namespace {

/// Whether sums in the order of this map are those of the group's nodes.
bool isOfNodes(at::IntArrayRef map, const Topology& topology) {
  std::vector<int32_t> nodes;
  for (int rank = 0; rank < topology.size(); ++rank) {
    nodes.push_back(topology.nodeOf(rank));
  }
  // Other labels are refused where the host makes the plan.
  return map.empty() || std::ranges::equal(map, nodes);
}

/// As kernels read them. Ids of int64 that do not fit stay what they are: none
/// of any expert.
at::Tensor narrowIds(const at::Tensor& ids) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  return (ids.scalar_type() == at::kInt ? ids : at::clamp(ids, -2, kMost))
      .to(at::kInt)
      .contiguous();
}

/// Reads the lists that a device has when they are asked for, and keeps them.
class ListsOnDevice {
 public:
  ListsOnDevice(
      std::weak_ptr<DeviceGroup> devices,
      std::weak_ptr<const DeviceRoute> route)
      : devices_(std::move(devices)), route_(std::move(route)) {}

  KnownRoute::OnHost read() {
    const std::lock_guard lock(mutex_);
    if (!read_.words.defined()) {
      const auto devices = devices_.lock();
      const auto route = route_.lock();
      TORCH_CHECK_VALUE(
          devices != nullptr && route != nullptr,
          "route: the group that made this plan on its devices has ended; make "
          "a new plan");
      const auto lists = devices->exchange()->readBack(*route);
      read_ = {toTensor(lists.words), toTensor(lists.offsets)};
    }
    return read_;
  }

 private:
  const std::weak_ptr<DeviceGroup> devices_;
  const std::weak_ptr<const DeviceRoute> route_;
  std::mutex mutex_;
  KnownRoute::OnHost read_;
};

/// The tensor that stands for a route, and what is known by it.
at::Tensor makeRoute(
    const std::shared_ptr<DeviceGroup>& devices,
    const std::shared_ptr<const DeviceRoute>& route,
    const Topology& topology) {
  const RouteHeader& header = route->planned()->header;
  KnownRoute known;
  known.facts = {
      .rank = header.rank,
      .size = header.size,
      .numTokens = header.numTokens,
      .topK = header.topK,
      .numSendRows = header.numSendRows,
      .numReceiveRows = header.numReceiveRows,
      .sumsPerNode = true};
  for (int rank = 0; rank < topology.size(); ++rank) {
    known.nodeOfRank.push_back(topology.nodeOf(rank));
  }
  known.lists->of(devices->exchange(), [&] { return route; });
  known.onHost = [on = std::make_shared<ListsOnDevice>(devices, route)] {
    return on->read();
  };
  at::Tensor words = toTensor(route->headerWords());
  KnownRoutes::instance().add(words, std::move(known));
  return words;
}

PlanTensors planBy(
    const RegisteredGroup& group,
    const std::shared_ptr<DeviceGroup>& devices,
    const PlanInputs& inputs,
    const at::Tensor& ids) {
  const c10::Device device = ids.device();
  const Topology& topology = group.group->topology();
  const int64_t experts =
      numExpertsOf(topology.rank(), inputs.numExperts, topology.size());
  at::Tensor index;
  const at::Tensor perExpert = emptyList(experts, at::kInt, device);
  const at::Tensor offsets = emptyList(experts, at::kInt, device);
  const auto at = [](const at::Tensor& tensor) {
    return tensor.mutable_data_ptr<int32_t>();
  };
  DevicePlanArguments arguments;
  arguments.topkIds = bytesOf(ids);
  arguments.numTokens = ids.size(0);
  arguments.topK = ids.size(1);
  arguments.numExperts = inputs.numExperts;
  arguments.align = inputs.align;
  arguments.maxReceiveTokens = inputs.maxReceiveTokens;
  // This thread's stream gets nothing between `after` and this, so the memory
  // is free in the order of that stream.
  arguments.allocate = [&](size_t rows) {
    index = emptyList(static_cast<int64_t>(rows), at::kInt, device);
    return DevicePlanArguments::Outputs{at(index), at(perExpert), at(offsets)};
  };
  const CurrentStreamEvent after = inputsReady(*group.group, device);
  DeviceExchange::Terms terms;
  terms.after = after.get();
  terms.timeout = group.options->timeout;
  terms.maxBlocks = group.options->maxCtas.value_or(0);
  terms.callbacks =
      keepingTensors(std::make_shared<KeptTensors>(std::vector{ids}));
  const DeviceExchange::Planned planned =
      devices->exchange()->plan(arguments, std::move(terms));
  awaitOnCurrentStream(device, planned.call.done->get());
  return {
      makeRoute(devices, planned.route, topology), index, perExpert, offsets};
}

}  // namespace

std::optional<PlanTensors> planOnDevices(const PlanInputs& inputs) {
  const c10::Device device = inputs.topkIds.device();
  const std::optional<RegisteredGroup> group = findGroup(inputs.groupName);
  if (!device.is_cuda() || !group.has_value() ||
      !isOfNodes(inputs.reductionMap, group->group->topology())) {
    return std::nullopt;
  }
  const auto devices = deviceGroupOf(*group, device.index());
  if (devices->exchange() == nullptr) {
    return std::nullopt;
  }
  const auto onHost = findRowExchange(inputs.groupName);
  const at::Tensor ids = checked(*onHost, OperationKind::kDevicePlan, [&] {
    at::Tensor given = checkedIds("plan", inputs.topkIds, device);
    PlanArguments arguments;
    arguments.numTokens = given.size(0);
    arguments.topK = given.size(1);
    arguments.numExperts = inputs.numExperts;
    arguments.align = inputs.align;
    arguments.maxReceiveTokens = inputs.maxReceiveTokens;
    checkPlanSizes(arguments);
    devices->checkOrdinal(device);
    return narrowIds(given);
  });
  return planBy(*group, devices, inputs, ids);
}

at::Tensor routeWords(const at::Tensor& words) {
  return isRouteOnDevice(int32sOf(words))
             ? KnownRoutes::instance().find(words)->onHost().words
             : words;
}

}  // namespace automoe
