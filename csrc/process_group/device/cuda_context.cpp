// SPDX-License-Identifier: Apache-2.0
#include "process_group/device/cuda_context.hpp"

#include "process_group/device/cuda_driver.hpp"

namespace automoe {

CudaContext::CudaContext(int ordinal) {
  CUresult (*getDevice)(CUdevice*, int) = nullptr;
  CUresult (*retain)(CUcontext*, CUdevice) = nullptr;
  findDriverFunction("cuDeviceGet", 2000, getDevice);
  findDriverFunction("cuDevicePrimaryCtxRetain", 7000, retain);
  findDriverFunction("cuDevicePrimaryCtxRelease", 11000, release_);
  findDriverFunction("cuCtxPushCurrent", 4000, push_);
  findDriverFunction("cuCtxPopCurrent", 4000, pop_);
  checkDriver(getDevice(&device_, ordinal), "cuDeviceGet");
  checkDriver(retain(&context_, device_), "cuDevicePrimaryCtxRetain");
}

CudaContext::~CudaContext() {
  // Fails where the driver has been shut down, as the process ends.
  release_(device_);
}

CurrentContext::CurrentContext(const CudaContext& context) : context_(context) {
  const CUresult result = context_.push_(context_.context_);
  // As the process ends, the driver may have been shut down: the calls that
  // follow say so.
  pushed_ = result != CUDA_ERROR_DEINITIALIZED;
  if (pushed_) {
    checkDriver(result, "cuCtxPushCurrent");
  }
  cudaThreadExchangeStreamCaptureMode(&captureMode_);
}

CurrentContext::~CurrentContext() {
  cudaThreadExchangeStreamCaptureMode(&captureMode_);
  CUcontext context = nullptr;
  if (pushed_) {
    context_.pop_(&context);
  }
}

}  // namespace automoe
