// SPDX-License-Identifier: Apache-2.0
// In the place of the CUDA sources, in a build without CUDA.
#include "process_group/device/cuda_device.hpp"
#include "process_group/device/cuda_facts.hpp"

namespace automoe {
namespace {

constexpr const char* kReason =
    "this torch_automoe is built without CUDA (it is built with CUDA where "
    "torch is a CUDA build and nvcc is found)";

}  // namespace

CudaDeviceResult makeCudaDevice(int) {
  return {nullptr, kReason};
}

bool isCapturingCuda(Device::Stream) {
  return false;
}

bool hasHappenedCuda(Device::Event) {
  return true;
}

std::unique_ptr<DeviceNetwork> makeCudaNetwork(
    int,
    const NcclFunctions&,
    const NcclId&,
    NcclNetwork::Place,
    const NcclNetwork::Terms&) {
  throw DeviceError(kReason);
}

void addCudaFacts(int, DeviceFacts& facts) {
  facts.whyNoDevice = kReason;
}

}  // namespace automoe
