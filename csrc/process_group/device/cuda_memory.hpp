// SPDX-License-Identifier: Apache-2.0
// Memory of a CUDA device that other processes of the node open.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <mutex>

#include "process_group/device/device.hpp"

namespace automoe {

/// Thread-safe. The device is current in every call.
class CudaMemory {
 public:
  explicit CudaMemory(int ordinal);

  std::byte* allocate(size_t bytes) const;
  std::byte* allocateShared(size_t bytes);
  void free(std::byte* memory) noexcept;
  /// `memory` may lie within what allocateShared() returned.
  Device::Handle exportMemory(const std::byte* memory);
  std::byte* openMemory(const Device::Handle& handle);
  void closeMemory(std::byte* memory) noexcept;

 private:
  struct Opened {
    void* base = nullptr;  // null: memory of this process
    size_t times = 0;
  };

  void enablePeer(const cudaUUID_t& owner) const;

  const int ordinal_;
  cudaUUID_t uuid_ = {};
  std::mutex mutex_;
  std::map<const std::byte*, size_t> shared_;
  std::map<std::byte*, Opened> opened_;
};

}  // namespace automoe
