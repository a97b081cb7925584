// SPDX-License-Identifier: Apache-2.0
// The devices of a CUDA library without a GPU, and what it takes of the driver.
#include <cuda.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <span>

#include "cuda_library/streams.hpp"

using namespace automoe::cuda_library;

namespace {

thread_local int currentDevice = 0;

int countDevices() {
  const char* asked = std::getenv("AUTOMOE_TEST_GPUS");
  return asked == nullptr ? 1 : std::atoi(asked);
}

// ---- the driver ----

CUresult getDevice(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult retainContext(CUcontext* context, CUdevice device) {
  *context = reinterpret_cast<CUcontext>(static_cast<intptr_t>(device) + 1);
  return CUDA_SUCCESS;
}

CUresult getContextState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

CUresult releaseContext(CUdevice) {
  return CUDA_SUCCESS;
}

CUresult getContext(CUcontext* context) {
  return retainContext(context, currentDevice);
}

thread_local std::vector<int> pushed;

CUresult pushContext(CUcontext context) {
  pushed.push_back(currentDevice);
  currentDevice = static_cast<int>(reinterpret_cast<intptr_t>(context) - 1);
  return CUDA_SUCCESS;
}

CUresult popContext(CUcontext*) {
  currentDevice = pushed.back();
  pushed.pop_back();
  return CUDA_SUCCESS;
}

CUresult describe(CUresult, const char** text) {
  *text = "refused by the library of the tests";
  return CUDA_SUCCESS;
}

CUresult batchMemoryOperations(
    CUstream stream,
    unsigned count,
    CUstreamBatchMemOpParams* operations,
    unsigned) {
  Stream& on = streamOf(stream);
  for (const auto& each : std::span(operations, count)) {
    auto* const word = reinterpret_cast<uint32_t*>(each.waitValue.address);
    const uint32_t value = each.waitValue.value;
    switch (each.operation) {
      case CU_STREAM_MEM_OP_WAIT_VALUE_32:
        on.enqueue([=] {
          return std::atomic_ref(*word).load(std::memory_order_acquire) ==
                 value;
        });
        break;
      case CU_STREAM_MEM_OP_WRITE_VALUE_32:
        on.enqueue([=] {
          std::atomic_ref(*word).store(value, std::memory_order_release);
          return true;
        });
        break;
      default:
        return CUDA_ERROR_NOT_SUPPORTED;
    }
  }
  return CUDA_SUCCESS;
}

CUresult refuse() {
  return CUDA_ERROR_NOT_SUPPORTED;
}

struct DriverFunction {
  const char* name;
  void* address;
};

const DriverFunction kDriver[] = {
    {"cuDeviceGet", reinterpret_cast<void*>(getDevice)},
    {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(retainContext)},
    {"cuDevicePrimaryCtxGetState", reinterpret_cast<void*>(getContextState)},
    {"cuDevicePrimaryCtxRelease", reinterpret_cast<void*>(releaseContext)},
    {"cuCtxGetCurrent", reinterpret_cast<void*>(getContext)},
    {"cuCtxPushCurrent", reinterpret_cast<void*>(pushContext)},
    {"cuCtxPopCurrent", reinterpret_cast<void*>(popContext)},
    {"cuGetErrorString", reinterpret_cast<void*>(describe)},
    {"cuStreamBatchMemOp", reinterpret_cast<void*>(batchMemoryOperations)},
};

}  // namespace

namespace automoe::cuda_library {

void* driverFunction(const char* name) {
  for (const DriverFunction& each : kDriver) {
    if (std::strcmp(each.name, name) == 0) {
      return each.address;
    }
  }
  return reinterpret_cast<void*>(refuse);
}

}  // namespace automoe::cuda_library

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = countDevices();
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = currentDevice;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= countDevices()) {
    return refused(cudaErrorInvalidDevice);
  }
  currentDevice = device;
  return deviceError();
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* is, int device) {
  *is = {};
  std::strcpy(is->name, "GPU of the tests");
  is->uuid.bytes[0] = static_cast<char>(device + 1);
  is->totalGlobalMem = size_t{4} << 30;
  is->sharedMemPerBlock = size_t{48} << 10;
  is->regsPerBlock = 65536;
  is->warpSize = 32;
  is->maxThreadsPerBlock = 1024;
  is->maxThreadsPerMultiProcessor = 2048;
  is->multiProcessorCount = 4;
  is->major = 9;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(
    int* value, enum cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int bytes, int device) {
  std::snprintf(text, static_cast<size_t>(bytes), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int* access, int, int) {
  *access = 1;
  return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  return takeLastError();
}

cudaError_t cudaPeekAtLastError() {
  return deviceError();
}

cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name,
    void** function,
    unsigned,
    unsigned long long,
    enum cudaDriverEntryPointQueryResult* found) {
  *function = driverFunction(name);
  if (found != nullptr) {
    *found = cudaDriverEntryPointSuccess;
  }
  return cudaSuccess;
}
}
