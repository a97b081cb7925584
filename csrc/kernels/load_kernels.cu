// SPDX-License-Identifier: Apache-2.0
// All kernels on a device, before the first of them is launched.
#include "kernels/cuda_language.cuh"

namespace automoe::kernels {
namespace {

void load(const void* kernel) {
#ifdef AUTOMOE_EMULATE_CUDA
  emulated::load(kernel);
#else
  // Some of these, such as maxThreadsPerBlock, only a loaded kernel has.
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) {
    cudaGetLastError();  // else a later call of somebody else reports it
    throw std::runtime_error(
        std::string("CUDA cannot load the kernels of torch_automoe: ") +
        cudaGetErrorString(error) +
        "; see whether it is built for the compute capability of this GPU");
  }
#endif
}

}  // namespace

void loadKernels() {
  for (const void* kernel : allKernels()) {
    load(kernel);
  }
}

}  // namespace automoe::kernels
