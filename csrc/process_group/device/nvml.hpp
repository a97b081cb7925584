// SPDX-License-Identifier: Apache-2.0
// What NVML, a library of the NVIDIA driver, tells about a device.
#pragma once

#include <optional>

#include "process_group/device/device_facts.hpp"

namespace automoe {

/// "GPU-01234567-89ab-...", as NVML and nvidia-smi write it.
std::string uuidText(const DeviceUuid& uuid);
/// Nothing for another text, such as that of a MIG instance.
std::optional<DeviceUuid> parseUuid(const std::string& text);

/// Adds NVLink, the fabric and peers that the process itself does not see (by
/// CUDA_VISIBLE_DEVICES). What lacks is noted.
void addNvmlFacts(DeviceFacts& facts);

}  // namespace automoe
