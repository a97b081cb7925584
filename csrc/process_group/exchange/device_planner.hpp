// SPDX-License-Identifier: Apache-2.0
// The plans that devices make for one group.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>

#include "process_group/exchange/device_plan.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {

/// Makes the plans of one DeviceExchange. Not thread-safe.
///
/// Every id crosses the network once per node, into the arena of the rank that
/// lands it; all ranks of the node read it there. The lists are those of
/// RouteBuilder and makeRouteLists(), to the bit, but that all receive rows are
/// staged, and that with maxReceiveTokens the fingerprint does not depend on
/// the ids, which the host does not know then.
class DevicePlanner {
 public:
  DevicePlanner(
      Engine& engine,
      Group& group,
      std::shared_ptr<Device> device,
      std::shared_ptr<DeviceListPool> pool);

  /// Collective among hosts, and the same on all ranks. Throws InvalidArgument
  /// naming two ranks and both values where they differ.
  AgreedPlan agree(
      const DevicePlanArguments& arguments, std::chrono::milliseconds timeout);

  /// Enqueues the plan and fills `route`. Throws InvalidArgument, with nothing
  /// more enqueued and on all ranks, when there are ids of no expert; not with
  /// maxReceiveTokens, where such ids count as -1.
  void enqueue(
      const DeviceLane& lane,
      const DevicePlanArguments& arguments,
      const AgreedPlan& agreed,
      const DevicePlan::HostWait& wait,
      DeviceRoute& route);

  /// What the device may still use is never freed.
  void keepForEver() { scratch_.keepForEver(); }

 private:
  Engine& engine_;
  Group& group_;
  const std::shared_ptr<Device> device_;
  const std::shared_ptr<DeviceListPool> pool_;
  DeviceBuffer scratch_;
  uint64_t plans_ = 0;
};

}  // namespace automoe
