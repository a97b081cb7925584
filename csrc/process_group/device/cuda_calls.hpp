// SPDX-License-Identifier: Apache-2.0
// How the CUDA runtime is called: every result is checked.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "process_group/common/log.hpp"
#include "process_group/device/device.hpp"

namespace automoe {

inline std::string describe(const char* call, cudaError_t result) {
  return concat(
      call,
      " failed: ",
      cudaGetErrorName(result),
      " (",
      cudaGetErrorString(result),
      ")");
}

/// Throws DeviceError.
inline void checkCuda(cudaError_t result, const char* call) {
  if (result != cudaSuccess) {
    cudaGetLastError();  // Or the next check of torch finds it.
    throw DeviceError(describe(call, result));
  }
}

/// For where nothing can be thrown. A runtime that unloads, as the process
/// ends, has freed everything already.
inline void warnCuda(cudaError_t result, const char* call) noexcept {
  if (result != cudaSuccess && result != cudaErrorCudartUnloading) {
    cudaGetLastError();
    int ordinal = -1;
    cudaGetDevice(&ordinal);
    log(LogLevel::kWarn, concat("GPU ", ordinal, ": ", describe(call, result)));
  }
}

}  // namespace automoe
