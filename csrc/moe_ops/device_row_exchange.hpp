// SPDX-License-Identifier: Apache-2.0
// Rows between the devices of a group, by its DeviceExchange.
#pragma once

#include <memory>

#include "moe_ops/row_exchange.hpp"

namespace automoe {

/// Null where rows on this device are staged through the host: for a device
/// that is not a CUDA device, a group that is not ours, one whose devices
/// cannot reach each other, or a route without sums per node. Every rank gets
/// the same. Else for calls on this route. Collective at the first use of a
/// group.
std::unique_ptr<RowExchange> findDeviceExchange(
    const std::string& groupName, c10::Device device, const at::Tensor& route);

}  // namespace automoe
