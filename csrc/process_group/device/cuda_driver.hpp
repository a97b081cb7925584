// SPDX-License-Identifier: Apache-2.0
// Functions of the NVIDIA driver. It is found at run time, by the CUDA runtime:
// so what is built here also loads where there is no driver.
#pragma once

#include <cuda.h>

#include "process_group/common/error.hpp"
#include "process_group/device/device.hpp"

namespace automoe {

/// As of this CUDA version, 11070 is 11.7; null where the driver lacks it.
void* findDriverFunction(const char* name, unsigned since) noexcept;

/// Throws DeviceError where the driver lacks it.
template <typename Function>
void findDriverFunction(const char* name, unsigned since, Function*& function) {
  function = reinterpret_cast<Function*>(findDriverFunction(name, since));
  if (function == nullptr) {
    throw DeviceError(concat(
        "the NVIDIA driver has no ",
        name,
        " of CUDA ",
        since / 1000,
        ".",
        since % 1000 / 10,
        "; update the driver"));
  }
}

/// Throws DeviceError unless it is a success.
void checkDriver(CUresult result, const char* call);

}  // namespace automoe
