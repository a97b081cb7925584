// SPDX-License-Identifier: Apache-2.0
// Which device the calls of a thread go to.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace automoe {

/// The context of a device that the CUDA runtime, and so torch, uses; it stays
/// as long as this.
class CudaContext {
 public:
  /// Throws DeviceError.
  explicit CudaContext(int ordinal);
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

 private:
  friend class CurrentContext;

  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  CUresult (*release_)(CUdevice) = nullptr;
  CUresult (*push_)(CUcontext) = nullptr;
  CUresult (*pop_)(CUcontext*) = nullptr;
};

/// Makes the device of a context current. The thread is then left as it was
/// found: cudaSetDevice could not, as it makes a context on the device that a
/// fresh thread has by default. What is called meanwhile does not count as
/// unsafe for graphs that other threads capture: none of it touches their
/// streams.
class CurrentContext {
 public:
  /// Throws DeviceError.
  explicit CurrentContext(const CudaContext& context);
  ~CurrentContext();
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;

 private:
  const CudaContext& context_;
  bool pushed_ = false;
  cudaStreamCaptureMode captureMode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace automoe
