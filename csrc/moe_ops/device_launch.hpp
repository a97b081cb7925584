// SPDX-License-Identifier: Apache-2.0
// Kernels in the order of a device's current stream.
#pragma once

#include <c10/core/Device.h>

#include <functional>

#include "kernels/device_kernels.hpp"

namespace automoe {

/// Calls `launch` with a stream whose kernels come after what is on the current
/// stream of the device, and before what comes there later; the device is
/// current meanwhile.
void launchOn(
    c10::Device device,
    const std::function<void(kernels::DeviceStream)>& launch);

}  // namespace automoe
