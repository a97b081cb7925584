// SPDX-License-Identifier: Apache-2.0
#include "process_group/device/cuda_flags.hpp"

#include <algorithm>
#include <vector>

#include "process_group/device/cuda_driver.hpp"

namespace automoe {
namespace {

constexpr const char* kBatch = "cuStreamBatchMemOp";
// Since then, no option of the driver is needed for it.
constexpr unsigned kSince = 11070;
// The driver takes less than 256 at once.
constexpr size_t kMostAtOnce = 128;

CUstreamBatchMemOpParams makeSet(uint32_t* flag, uint32_t value) {
  CUstreamBatchMemOpParams params = {};
  params.writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_32;
  params.writeValue.address = reinterpret_cast<CUdeviceptr>(flag);
  params.writeValue.value = value;
  // The default has the barrier that orders it after the stream's writes.
  params.writeValue.flags = CU_STREAM_WRITE_VALUE_DEFAULT;
  return params;
}

CUstreamBatchMemOpParams makeAwait(uint32_t* flag, uint32_t value) {
  CUstreamBatchMemOpParams params = {};
  params.waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_32;
  params.waitValue.address = reinterpret_cast<CUdeviceptr>(flag);
  params.waitValue.value = value;
  params.waitValue.flags = CU_STREAM_WAIT_VALUE_EQ;
  return params;
}

}  // namespace

CudaFlags::CudaFlags() {
  findDriverFunction(kBatch, kSince, batch_);
}

void CudaFlags::set(
    cudaStream_t stream,
    std::span<uint32_t* const> flags,
    uint32_t value) const {
  std::vector<CUstreamBatchMemOpParams> all;
  for (uint32_t* flag : flags) {
    all.push_back(makeSet(flag, value));
  }
  enqueue(stream, all);
}

void CudaFlags::await(
    cudaStream_t stream,
    std::span<uint32_t* const> flags,
    uint32_t value,
    uint32_t next) const {
  std::vector<CUstreamBatchMemOpParams> all;
  for (uint32_t* flag : flags) {
    all.push_back(makeAwait(flag, value));
    if (next != value) {
      all.push_back(makeSet(flag, next));
    }
  }
  enqueue(stream, all);
}

void CudaFlags::enqueue(
    cudaStream_t stream, std::span<CUstreamBatchMemOpParams> all) const {
  for (size_t begin = 0; begin < all.size(); begin += kMostAtOnce) {
    const auto part =
        all.subspan(begin, std::min(kMostAtOnce, all.size() - begin));
    checkDriver(
        batch_(stream, static_cast<unsigned>(part.size()), part.data(), 0),
        kBatch);
  }
}

bool cudaFlagsSupported() noexcept {
  return findDriverFunction(kBatch, kSince) != nullptr;
}

}  // namespace automoe
