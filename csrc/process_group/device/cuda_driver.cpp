// SPDX-License-Identifier: Apache-2.0
#include "process_group/device/cuda_driver.hpp"

#include <cuda_runtime_api.h>

namespace automoe {

void* findDriverFunction(
    const char* name, [[maybe_unused]] unsigned since) noexcept {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t result = cudaGetDriverEntryPointByVersion(
      name, &function, since, cudaEnableDefault, &found);
#else
  const cudaError_t result =
      cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found);
#endif
  if (result != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  return function;
}

void checkDriver(CUresult result, const char* call) {
  if (result == CUDA_SUCCESS) {
    return;
  }
  CUresult (*errorString)(CUresult, const char**) = nullptr;
  findDriverFunction("cuGetErrorString", 6000, errorString);
  const char* text = nullptr;
  errorString(result, &text);
  throw DeviceError(concat(
      call,
      " failed: ",
      text == nullptr ? "an unknown error" : text,
      " (",
      static_cast<int>(result),
      ")"));
}

}  // namespace automoe
