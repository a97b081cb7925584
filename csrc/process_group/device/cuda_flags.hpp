// SPDX-License-Identifier: Apache-2.0
// Flags of streams: two functions of the driver, which is found at run time.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace automoe {

class CudaFlags {
 public:
  /// Throws DeviceError where the driver is too old for them.
  explicit CudaFlags(int ordinal);

  void set(cudaStream_t stream, uint32_t* flag, uint32_t value) const;
  void await(cudaStream_t stream, uint32_t* flag, uint32_t value) const;

 private:
  using Operation = CUresult(CUstream, CUdeviceptr, cuuint32_t, unsigned);

  Operation* write_ = nullptr;
  Operation* wait_ = nullptr;
  unsigned waitMode_ = CU_STREAM_WAIT_VALUE_EQ;
};

/// Whether CudaFlags can be made, without making them.
bool cudaFlagsSupported() noexcept;

}  // namespace automoe
