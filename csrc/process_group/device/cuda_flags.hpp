// SPDX-License-Identifier: Apache-2.0
// Flags of streams: a function of the driver, which is found at run time.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

namespace automoe {

class CudaFlags {
 public:
  /// Throws DeviceError where the driver is too old for them.
  CudaFlags();

  void set(
      cudaStream_t stream,
      std::span<uint32_t* const> flags,
      uint32_t value) const;
  /// They become `next`, one after the other.
  void await(
      cudaStream_t stream,
      std::span<uint32_t* const> flags,
      uint32_t value,
      uint32_t next) const;

 private:
  using Batch =
      CUresult(CUstream, unsigned, CUstreamBatchMemOpParams*, unsigned);

  void enqueue(
      cudaStream_t stream, std::span<CUstreamBatchMemOpParams> all) const;

  Batch* batch_ = nullptr;
};

/// Whether CudaFlags can be made, without making them.
bool cudaFlagsSupported() noexcept;

}  // namespace automoe
