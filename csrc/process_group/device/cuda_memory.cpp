// SPDX-License-Identifier: Apache-2.0
#include "process_group/device/cuda_memory.hpp"

#include <algorithm>
#include <cstring>
#include <random>

#include "process_group/device/cuda_calls.hpp"

namespace automoe {
namespace {

// A smaller allocation shares its block with others, which would be exported
// too.
constexpr size_t kBlock = size_t{2} << 20;
constexpr uint32_t kMagic = 0x69706363;

struct HandleFields {
  uint32_t magic = kMagic;
  int32_t ordinal = 0;  // in the owner, for texts
  uint64_t process = 0;
  uint64_t address = 0;  // in the owner
  uint64_t offset = 0;   // of the address in the allocation
  cudaUUID_t uuid = {};
  cudaIpcMemHandle_t memory = {};
};
static_assert(sizeof(HandleFields) <= sizeof(Device::Handle));
static_assert(std::is_trivially_copyable_v<HandleFields>);

/// Not the process's number: containers of one node may have equal ones.
uint64_t processToken() {
  static const uint64_t token = [] {
    std::random_device random;
    return (uint64_t{random()} << 32) | random();
  }();
  return token;
}

bool operator==(const cudaUUID_t& one, const cudaUUID_t& other) {
  return std::memcmp(one.bytes, other.bytes, sizeof(one.bytes)) == 0;
}

cudaUUID_t uuidOf(int ordinal) {
  cudaDeviceProp properties;
  checkCuda(
      cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
  return properties.uuid;
}

/// The number in this process of a device, or -1: it is not visible here.
int ordinalOf(const cudaUUID_t& uuid) {
  int count = 0;
  checkCuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    if (uuidOf(ordinal) == uuid) {
      return ordinal;
    }
  }
  return -1;
}

}  // namespace

CudaMemory::CudaMemory(int ordinal)
    : ordinal_(ordinal), uuid_(uuidOf(ordinal)) {}

std::byte* CudaMemory::allocate(size_t bytes) const {
  void* memory = nullptr;
  const cudaError_t result = cudaMalloc(&memory, std::max(bytes, size_t{1}));
  if (result == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw DeviceFullError(concat(
        "cudaMalloc of ",
        bytes,
        " bytes failed: GPU ",
        ordinal_,
        " is full; use smaller batches, or leave torch less of its memory "
        "(torch.cuda.set_per_process_memory_fraction)"));
  }
  checkCuda(result, "cudaMalloc");
  return static_cast<std::byte*>(memory);
}

std::byte* CudaMemory::allocateShared(size_t bytes) {
  const size_t whole =
      (std::max(bytes, size_t{1}) + kBlock - 1) / kBlock * kBlock;
  std::byte* memory = allocate(whole);
  const std::lock_guard lock(mutex_);
  shared_[memory] = whole;
  return memory;
}

void CudaMemory::free(std::byte* memory) noexcept {
  {
    const std::lock_guard lock(mutex_);
    shared_.erase(memory);
  }
  // It waits for the work of the device.
  warnCuda(cudaFree(memory), "cudaFree");
}

Device::Handle CudaMemory::exportMemory(const std::byte* memory) {
  HandleFields fields;
  std::byte* base = nullptr;
  {
    const std::lock_guard lock(mutex_);
    auto next = shared_.upper_bound(memory);
    AUTOMOE_CHECK(
        next != shared_.begin() &&
            memory < std::prev(next)->first + std::prev(next)->second,
        "exportMemory got memory that is not of allocateShared()");
    base = const_cast<std::byte*>(std::prev(next)->first);
  }
  checkCuda(cudaIpcGetMemHandle(&fields.memory, base), "cudaIpcGetMemHandle");
  fields.ordinal = ordinal_;
  fields.process = processToken();
  fields.address = reinterpret_cast<uint64_t>(memory);
  fields.offset = static_cast<uint64_t>(memory - base);
  fields.uuid = uuid_;
  Device::Handle handle;
  std::memcpy(handle.bytes.data(), &fields, sizeof(fields));
  return handle;
}

std::byte* CudaMemory::openMemory(const Device::Handle& handle) {
  HandleFields fields;
  std::memcpy(&fields, handle.bytes.data(), sizeof(fields));
  if (fields.magic != kMagic) {
    throw DeviceError(
        "openMemory got a handle that no CUDA device made; do all ranks of "
        "the node run the same build?");
  }
  void* base = nullptr;
  std::byte* memory = nullptr;
  if (fields.process == processToken()) {
    // CUDA opens nothing in the process that owns it.
    enablePeer(fields.uuid);
    memory = reinterpret_cast<std::byte*>(fields.address);
  } else {
    const cudaError_t result = cudaIpcOpenMemHandle(
        &base, fields.memory, cudaIpcMemLazyEnablePeerAccess);
    if (result != cudaSuccess) {
      cudaGetLastError();
      throw DeviceError(concat(
          describe("cudaIpcOpenMemHandle", result),
          ": GPU ",
          ordinal_,
          " of this process cannot map memory of GPU ",
          fields.ordinal,
          " of another one",
          fields.uuid == uuid_ ? ", which is the same GPU" : "",
          "; automoe.explain_topology() says which GPUs have peer access, and "
          "containers of one node need a common IPC namespace"));
    }
    memory = static_cast<std::byte*>(base) + fields.offset;
  }
  const std::lock_guard lock(mutex_);
  Opened& opened = opened_[memory];
  opened.base = base;
  ++opened.times;
  return memory;
}

/// So that this device can use memory of another one of this process.
void CudaMemory::enablePeer(const cudaUUID_t& owner) const {
  if (owner == uuid_) {
    return;
  }
  const int peer = ordinalOf(owner);
  if (peer < 0) {
    throw DeviceError(concat(
        "GPU ",
        ordinal_,
        " is to use memory of another rank of this process, on a GPU that the "
        "process does not see; let CUDA_VISIBLE_DEVICES name both"));
  }
  const cudaError_t result = cudaDeviceEnablePeerAccess(peer, 0);
  if (result == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
    return;
  }
  checkCuda(
      result,
      concat("cudaDeviceEnablePeerAccess from GPU ", ordinal_, " to GPU ", peer)
          .c_str());
}

void CudaMemory::closeMemory(std::byte* memory) noexcept {
  void* base = nullptr;
  {
    const std::lock_guard lock(mutex_);
    const auto found = opened_.find(memory);
    if (found == opened_.end()) {
      log(LogLevel::kWarn,
          concat(
              "GPU ",
              ordinal_,
              ": closeMemory got memory that is not open: ",
              static_cast<const void*>(memory)));
      return;
    }
    base = found->second.base;
    if (--found->second.times == 0) {
      opened_.erase(found);
    }
  }
  if (base != nullptr) {
    // CUDA counts too.
    warnCuda(cudaIpcCloseMemHandle(base), "cudaIpcCloseMemHandle");
  }
}

}  // namespace automoe
