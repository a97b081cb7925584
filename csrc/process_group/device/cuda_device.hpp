// SPDX-License-Identifier: Apache-2.0
// NVIDIA GPUs by the CUDA runtime. A Device::Stream is a cudaStream_t and a
// Device::Event a cudaEvent_t, cast: so a user's streams and events can be
// given to the device, and its own to CUDA.
#pragma once

#include <chrono>
#include <memory>
#include <string>

#include "process_group/device/device.hpp"
#include "process_group/device/nccl.hpp"

namespace automoe {

struct CudaDeviceResult {
  std::unique_ptr<Device> device;  // null: there is none
  std::string reason;              // why there is none
};

/// The device of this number in this process, or the current one for -1.
/// Throws DeviceError for one that is there, but cannot be used.
CudaDeviceResult makeCudaDevice(int ordinal);

/// Whether what is enqueued on it is recorded into a graph, or may not even be
/// asked about that now.
bool isCapturingCuda(Device::Stream stream);
/// Of an event of torch's; not to be asked of one that a capture has recorded.
bool hasHappenedCuda(Device::Event event);

/// Collective, see NcclNetwork; of that device. Throws DeviceError.
std::unique_ptr<DeviceNetwork> makeCudaNetwork(
    int ordinal,
    const NcclFunctions& functions,
    const NcclId& id,
    NcclNetwork::Place place,
    const NcclNetwork::Terms& terms);

}  // namespace automoe
