// SPDX-License-Identifier: Apache-2.0
#include "process_group/device/cuda_flags.hpp"

#include "process_group/device/cuda_driver.hpp"

namespace automoe {
namespace {

// Since then, no option of the driver is needed for them.
constexpr unsigned kSince = 11070;

CUdeviceptr addressOf(uint32_t* flag) {
  return reinterpret_cast<CUdeviceptr>(flag);
}

}  // namespace

CudaFlags::CudaFlags(int ordinal) {
  CUresult (*getDevice)(CUdevice*, int) = nullptr;
  CUresult (*getAttribute)(int*, CUdevice_attribute, CUdevice) = nullptr;
  findDriverFunction("cuStreamWriteValue32", kSince, write_);
  findDriverFunction("cuStreamWaitValue32", kSince, wait_);
  findDriverFunction("cuDeviceGet", 2000, getDevice);
  findDriverFunction("cuDeviceGetAttribute", 2000, getAttribute);
  CUdevice device = 0;
  checkDriver(getDevice(&device, ordinal), "cuDeviceGet");
  int flushes = 0;
  const auto attribute = CU_DEVICE_ATTRIBUTE_CAN_FLUSH_REMOTE_WRITES;
  checkDriver(
      getAttribute(&flushes, attribute, device), "cuDeviceGetAttribute");
  if (flushes != 0) {
    // What a peer wrote here before the flag is then seen after it.
    waitMode_ |= CU_STREAM_WAIT_VALUE_FLUSH;
  }
}

void CudaFlags::set(cudaStream_t stream, uint32_t* flag, uint32_t value) const {
  // The default has the barrier that orders it after the stream's writes.
  checkDriver(
      write_(stream, addressOf(flag), value, CU_STREAM_WRITE_VALUE_DEFAULT),
      "cuStreamWriteValue32");
}

void CudaFlags::await(
    cudaStream_t stream, uint32_t* flag, uint32_t value) const {
  checkDriver(
      wait_(stream, addressOf(flag), value, waitMode_), "cuStreamWaitValue32");
}

bool cudaFlagsSupported() noexcept {
  return findDriverFunction("cuStreamWriteValue32", kSince) != nullptr &&
         findDriverFunction("cuStreamWaitValue32", kSince) != nullptr;
}

}  // namespace automoe
