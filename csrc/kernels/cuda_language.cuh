// SPDX-License-Identifier: Apache-2.0
// What the kernels need beyond C++: CUDA, or in tests its emulation on the CPU.
// Every kernel takes one struct, memory is read and written by load() and
// store(), and a shared array is made by AUTOMOE_SHARED, so that a test sees
// each wrong address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <vector>

#include "kernels/device_kernels.hpp"

#ifdef AUTOMOE_EMULATE_CUDA
#include <cuda/emulated_cuda.hpp>
#else
#include <cuda_runtime.h>

#define AUTOMOE_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace automoe::kernels {

#ifndef AUTOMOE_EMULATE_CUDA
template <class T>
__device__ __forceinline__ T load(const std::byte* from) {
  return *reinterpret_cast<const T*>(from);
}

/// Loads where `isWanted`, else leaves the value. kOnce: what is not read
/// again. A predicated load right into the value's registers: what compilers
/// make of an `if` here waits for each load before it issues the next.
template <bool kOnce>
__device__ __forceinline__ void loadIf(
    uint4& value, const std::byte* from, bool isWanted) {
  if constexpr (kOnce) {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n\t"
        "@p ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
        : "l"(from), "r"(isWanted ? 1U : 0U));
  } else {
    asm volatile(
        "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n\t"
        "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
        : "l"(from), "r"(isWanted ? 1U : 0U));
  }
}

template <bool kOnce, class T>
__device__ __forceinline__ void loadIf(
    T& value, const std::byte* from, bool isWanted) {
  if (isWanted) {
    const auto* const at = reinterpret_cast<const T*>(from);
    value = kOnce ? __ldcs(at) : *at;
  }
}

template <class T>
__device__ __forceinline__ void store(std::byte* to, T value) {
  *reinterpret_cast<T*>(to) = value;
}

/// Leaves the cache to what is read.
template <class T>
__device__ __forceinline__ void storeOnce(std::byte* to, T value) {
  __stcs(reinterpret_cast<T*>(to), value);
}

// Rounded products, which no compiler fuses into a sum.
__device__ __forceinline__ float multiply(float a, float b) {
  return __fmul_rn(a, b);
}
__device__ __forceinline__ double multiply(double a, double b) {
  return __dmul_rn(a, b);
}
#else
template <bool kOnce, class T>
void loadIf(T& value, const std::byte* from, bool isWanted) {
  if (isWanted) {
    value = load<T>(from);
  }
}

template <class T>
void storeOnce(std::byte* to, T value) {
  store(to, value);
}

inline float multiply(float a, float b) {
  return a * b;
}
inline double multiply(double a, double b) {
  return a * b;
}
#endif

/// The kernels of this library, for loadKernels().
inline std::vector<const void*>& allKernels() {
  static std::vector<const void*> all;
  return all;
}

/// A kernel as launch() takes it. Whoever names one in a call has put it among
/// allKernels() before main() begins, so none is left out there.
template <auto kFunction>
struct Kernel {
  static const void* address() {
    static_cast<void>(&kIsKnown);  // uses it, so that it is made
    return reinterpret_cast<const void*>(kFunction);
  }

  static inline const bool kIsKnown = [] {
    allKernels().push_back(reinterpret_cast<const void*>(kFunction));
#ifdef AUTOMOE_EMULATE_CUDA
    emulated::Known<kFunction>::add(typeid(Kernel).name());
#endif
    return true;
  }();
};

struct LaunchShape {
  unsigned blocks;
  unsigned blockThreads;
};

/// Enqueues `kFunction(call)`. Throws std::runtime_error when CUDA refuses it.
template <auto kFunction, class Call>
void launch(
    const char* name,
    Kernel<kFunction> kernel,
    LaunchShape shape,
    DeviceStream stream,
    const Call& call) {
#ifdef AUTOMOE_EMULATE_CUDA
  static_cast<void>(stream);
  emulated::launching(kernel.address());
  emulated::run(
      name, shape.blocks, shape.blockThreads, 0, [&] { kFunction(call); });
#else
  void* arguments[] = {const_cast<Call*>(&call)};
  const cudaError_t error = cudaLaunchKernel(
      kernel.address(),
      dim3(shape.blocks),
      dim3(shape.blockThreads),
      arguments,
      0,
      static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) {
    cudaGetLastError();  // else a later call of somebody else reports it
    throw std::runtime_error(
        std::string("CUDA refuses to launch ") + name + " with " +
        std::to_string(shape.blocks) + " blocks of " +
        std::to_string(shape.blockThreads) +
        " threads: " + cudaGetErrorString(error));
  }
#endif
}

/// The blocks for so many teams of threads: one team each, or as many as
/// `maxBlocks` and CUDA allow.
inline unsigned blocksFor(size_t teams, size_t teamsPerBlock, int maxBlocks) {
  constexpr size_t kMostBlocks = 0x7FFFFFFF;
  const size_t most =
      maxBlocks > 0 ? static_cast<size_t>(maxBlocks) : kMostBlocks;
  const size_t wanted = (teams + teamsPerBlock - 1) / teamsPerBlock;
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

}  // namespace automoe::kernels
