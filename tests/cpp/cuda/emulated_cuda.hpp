// SPDX-License-Identifier: Apache-2.0
// CUDA's language as a library: with this, kernels compile as C++ and run on
// the CPU. Blocks run one after the other in random order; the threads of a
// block in turn, in random order, each until it waits for others. A wait that
// cannot end, and an access at an address that its size does not divide, throw
// std::runtime_error out of run(). Grids and blocks have one dimension.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

/// An array that the threads of a block share.
#define AUTOMOE_SHARED(type, name, count) \
  static constexpr char name##Tag = 0;    \
  type* name = static_cast<type*>(        \
      ::automoe::emulated::shareArray(&name##Tag, sizeof(type) * (count)))

namespace automoe::emulated {

constexpr int warpSize = 32;

struct Index {
  unsigned x = 0;
};
extern constinit thread_local Index threadIdx;
extern constinit thread_local Index blockIdx;
extern constinit thread_local Index blockDim;
extern constinit thread_local Index gridDim;

struct uint4 {
  unsigned x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};

// ---- For tests ----

/// What the orders of the launches from now on derive from.
void setSeed(uint64_t seed);
/// Launches of this process so far.
uint64_t countLaunches();
/// Those of them whose kernel was not loaded before.
uint64_t countUnloadedLaunches();
/// Loads nothing, but forgets what was.
void unloadKernels();

/// Runs the body once for each thread of the grid. `name` is for errors.
void run(
    const char* name,
    unsigned gridBlocks,
    unsigned blockThreads,
    size_t sharedBytes,
    const std::function<void()>& body);

/// What CUDA does when a kernel is first used, or asked for its attributes.
void load(const void* kernel);
/// To be called before run().
void launching(const void* kernel);

/// A kernel by its mangled name, which is within that of a type.
struct KnownKernel {
  const char* name;
  size_t callBytes;
  void (*invoke)(const void* call);  // by one thread
};
std::vector<KnownKernel>& knownKernels();

template <auto kFunction>
struct Known;
template <class Call, void (*kFunction)(Call)>
struct Known<kFunction> {
  static void add(const char* name) {
    knownKernels().push_back(
        {name, sizeof(Call), [](const void* call) {
           kFunction(*static_cast<const std::remove_const_t<Call>*>(call));
         }});
  }
};

// ---- For kernels ----

using Site = std::source_location;

/// Ends the launch with an error that tells the thread.
[[noreturn]] void fail(const std::string& what);
/// Lets other threads run first, now and then.
void pause();
/// The block's array for this tag; filled with poison when the block begins.
void* shareArray(const void* tag, size_t bytes);
/// The shared memory that the launch asked for.
std::byte* dynamicShared();

enum class WarpCall : uint8_t { kSync, kShuffle, kBallot, kMatch };
/// Waits for all lanes in `mask`. `lane` is whose value a shuffle gives.
uint64_t meetWarp(
    WarpCall call, unsigned mask, uint64_t value, unsigned lane, Site site);
void meetBlock(Site site);

template <class T>
uint64_t wordOf(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}

template <class T>
T valueOf(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

/// An address that a GPU would refuse is an error.
template <class T>
void checkAddress(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    fail(
        "misaligned access of " + std::to_string(sizeof(T)) +
        " bytes at an address that ends with " +
        std::to_string(reinterpret_cast<uintptr_t>(address) % 16) + " (of 16)");
  }
}

template <class T>
T load(const std::byte* from) {
  checkAddress<T>(from);
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <class T>
void store(std::byte* to, T value) {
  checkAddress<T>(to);
  std::memcpy(to, &value, sizeof(T));
}

inline void __syncthreads(Site site = Site::current()) {
  meetBlock(site);
}

inline void __syncwarp(unsigned mask = ~0U, Site site = Site::current()) {
  meetWarp(WarpCall::kSync, mask, 0, 0, site);
}

inline unsigned laneOfThread() {
  return threadIdx.x % 32;
}

template <class T>
T __shfl_sync(
    unsigned mask,
    T value,
    int source,
    int width = warpSize,
    Site site = Site::current()) {
  const unsigned first = laneOfThread() & ~(static_cast<unsigned>(width) - 1);
  const unsigned lane = first + (static_cast<unsigned>(source) &
                                 static_cast<unsigned>(width - 1));
  return valueOf<T>(
      meetWarp(WarpCall::kShuffle, mask, wordOf(value), lane, site));
}

/// From the lane that is moved by `delta` (of either sign) in the same part of
/// `width` lanes, else from itself.
template <class T>
T shuffleBy(unsigned mask, T value, int delta, int width, Site site) {
  const int lane = static_cast<int>(laneOfThread());
  const int first = lane / width * width;
  const int from = lane + delta;
  const bool isInside = from >= first && from < first + width;
  return valueOf<T>(meetWarp(
      WarpCall::kShuffle,
      mask,
      wordOf(value),
      static_cast<unsigned>(isInside ? from : lane),
      site));
}

template <class T>
T __shfl_up_sync(
    unsigned mask,
    T value,
    unsigned delta,
    int width = warpSize,
    Site site = Site::current()) {
  return shuffleBy(mask, value, -static_cast<int>(delta), width, site);
}

template <class T>
T __shfl_down_sync(
    unsigned mask,
    T value,
    unsigned delta,
    int width = warpSize,
    Site site = Site::current()) {
  return shuffleBy(mask, value, static_cast<int>(delta), width, site);
}

template <class T>
T __shfl_xor_sync(
    unsigned mask,
    T value,
    int lanes,
    int width = warpSize,
    Site site = Site::current()) {
  const int lane = static_cast<int>(laneOfThread());
  return shuffleBy(mask, value, (lane ^ lanes) - lane, width, site);
}

inline unsigned __ballot_sync(
    unsigned mask, int predicate, Site site = Site::current()) {
  return static_cast<unsigned>(
      meetWarp(WarpCall::kBallot, mask, predicate != 0 ? 1U : 0U, 0, site));
}

inline int __any_sync(
    unsigned mask, int predicate, Site site = Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0 ? 1 : 0;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, Site site = Site::current()) {
  return static_cast<unsigned>(
      meetWarp(WarpCall::kMatch, mask, wordOf(value), 0, site));
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

template <class T>
T atomicAdd(T* at, T value) {
  checkAddress<T>(at);
  pause();
  const T before = *at;
  *at = static_cast<T>(before + value);
  return before;
}

}  // namespace automoe::emulated

namespace automoe::kernels {
using namespace emulated;
}
