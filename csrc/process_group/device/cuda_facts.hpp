// SPDX-License-Identifier: Apache-2.0
// What the CUDA runtime tells about a device.
#pragma once

#include "process_group/device/device_facts.hpp"

namespace automoe {

/// Sets `ordinal` and what follows from it, or `whyNoDevice`. In a build
/// without CUDA there is no device.
void addCudaFacts(int ordinal, DeviceFacts& facts);

}  // namespace automoe
