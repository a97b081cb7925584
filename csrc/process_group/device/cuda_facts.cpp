// SPDX-License-Identifier: Apache-2.0
#include "process_group/device/cuda_facts.hpp"

#include <array>
#include <cstring>

#include "process_group/device/cuda_calls.hpp"
#include "process_group/device/cuda_flags.hpp"

namespace automoe {
namespace {

DeviceUuid uuidOf(const cudaDeviceProp& properties) {
  DeviceUuid uuid;
  static_assert(sizeof(uuid) == sizeof(properties.uuid));
  std::memcpy(uuid.data(), &properties.uuid, uuid.size());
  return uuid;
}

/// How many devices this process sees; 0 with the reason.
int countDevices(DeviceFacts& facts) {
  int count = 0;
  const cudaError_t result = cudaGetDeviceCount(&count);
  if (result == cudaSuccess && count > 0) {
    return count;
  }
  cudaGetLastError();
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    facts.whyNoDevice = "there is no NVIDIA driver";
  } else if (result == cudaSuccess || result == cudaErrorNoDevice) {
    facts.whyNoDevice = "there is no NVIDIA GPU that this process may use";
  } else {
    facts.whyNoDevice = describe("cudaGetDeviceCount", result);
  }
  return 0;
}

void addPeers(int ordinal, int count, DeviceFacts& facts) {
  for (int other = 0; other < count; ++other) {
    if (other == ordinal) {
      continue;
    }
    cudaDeviceProp properties;
    checkCuda(
        cudaGetDeviceProperties(&properties, other), "cudaGetDeviceProperties");
    int access = 0;
    checkCuda(
        cudaDeviceCanAccessPeer(&access, ordinal, other),
        "cudaDeviceCanAccessPeer");
    facts.peers.push_back({uuidOf(properties), access != 0, false});
  }
}

}  // namespace

void addCudaFacts(int ordinal, DeviceFacts& facts) {
  const int count = countDevices(facts);
  if (count == 0) {
    return;
  }
  if (ordinal < 0) {
    checkCuda(cudaGetDevice(&ordinal), "cudaGetDevice");
  }
  if (ordinal >= count) {
    facts.whyNoDevice =
        concat("GPU ", ordinal, " is asked for; this process sees ", count);
    return;
  }
  cudaDeviceProp properties;
  checkCuda(
      cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
  facts.name = properties.name;
  facts.uuid = uuidOf(properties);
  facts.computeMajor = properties.major;
  facts.computeMinor = properties.minor;
  std::array<char, 32> busId = {};
  checkCuda(
      cudaDeviceGetPCIBusId(
          busId.data(), static_cast<int>(busId.size()), ordinal),
      "cudaDeviceGetPCIBusId");
  facts.pciBusId = busId.data();
  facts.ordinal = ordinal;
  facts.flagsSupported = cudaFlagsSupported();
  addPeers(ordinal, count, facts);
}

}  // namespace automoe
