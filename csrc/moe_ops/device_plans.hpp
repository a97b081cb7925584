// SPDX-License-Identifier: Apache-2.0
// Plans that the devices of a group make themselves.
#pragma once

#include <optional>

#include "moe_ops/call_inputs.hpp"
#include "moe_ops/operators.hpp"

namespace automoe {

/// All tensors are on the device but the route, which has only a header: the
/// lists stay where they are made, as long as that tensor lives. Nothing where
/// the plan has to be made on the host: as for findDeviceExchange(), or with a
/// reduction_map other than the group's nodes; on every rank alike. Collective.
///
/// The host waits for the other hosts, and then for the device to count; but
/// not for the device with max_recv_tokens.
std::optional<PlanTensors> planOnDevices(const PlanInputs& inputs);

/// The words of a route: the tensor's own, or those that a device has, for
/// which the host waits, once for each plan. `words`: int32, on the CPU.
at::Tensor routeWords(const at::Tensor& words);

}  // namespace automoe
