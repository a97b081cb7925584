// SPDX-License-Identifier: Apache-2.0
// What a DeviceExchange begins with: made, and tried, by all ranks together.
#pragma once

#include <chrono>
#include <memory>

#include "process_group/device/device.hpp"
#include "process_group/exchange/device_memory.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {

struct DeviceSetup {
  Device::Stream stream = nullptr;  // for the caller to destroy
  std::unique_ptr<DeviceMemory> memory;
};

/// Collective. Makes both, loads the kernels, and tries what calls rely on:
/// flags, reads from each node-mate, a byte to and from each rail peer. Where
/// that fails on one rank, all ranks throw DeviceError with its name; then the
/// group can be used on, without devices. `network` is null in one node.
DeviceSetup setUpDevices(
    Engine& engine,
    Group& group,
    Device& device,
    DeviceNetwork* network,
    std::chrono::milliseconds timeout);

}  // namespace automoe
