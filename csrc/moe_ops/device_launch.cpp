// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/device_launch.hpp"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace automoe {

void launchOn(
    c10::Device device,
    const std::function<void(kernels::DeviceStream)>& launch) {
  const c10::DeviceGuard current(device);
  const c10::impl::VirtualGuardImpl guard(device.type());
  launch(guard.getStream(device).native_handle());
}

}  // namespace automoe
