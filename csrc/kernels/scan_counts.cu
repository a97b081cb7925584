// SPDX-License-Identifier: Apache-2.0
// ScanCounts. Values are cut into tiles of one block each: the tiles are
// summed, and then every block adds what lies before its tile. The sums are of
// integers, so their order does not matter. One tile needs one launch.
#include "kernels/cuda_language.cuh"
#include "kernels/plan_kernels.hpp"

namespace automoe::kernels {
namespace {

constexpr unsigned kWarps = 8;
constexpr unsigned kThreads = kWarps * 32;
constexpr unsigned kValuesPerThread = 8;
constexpr unsigned kWarpValues = kValuesPerThread * 32;
constexpr unsigned kTileValues = kWarps * kWarpValues;
constexpr unsigned kAllLanes = ~0U;

struct Scan {
  ScanCounts values;
  uint64_t* tileSums;  // (tiles,)
};

/// A thread's first value; its others follow in steps of 32. So each warp has
/// values without gaps.
__device__ __forceinline__ size_t firstOfThread() {
  return static_cast<size_t>(blockIdx.x) * kTileValues +
         threadIdx.x / 32 * kWarpValues + threadIdx.x % 32;
}

__device__ __forceinline__ uint64_t
valueAt(const ScanCounts& call, size_t place) {
  return place < call.count ? call.values[place] : 0;
}

/// The sum over the warps' values; all threads of the block take part.
__device__ __forceinline__ uint64_t sumOfBlock(uint64_t value, uint64_t* sums) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  }
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = value;
  }
  __syncthreads();
  uint64_t total = 0;
#pragma unroll
  for (unsigned warp = 0; warp < kWarps; ++warp) {
    total += sums[warp];
  }
  return total;
}

__global__ void __launch_bounds__(kThreads)
    sumValues(const __grid_constant__ Scan call) {
  AUTOMOE_SHARED(uint64_t, sums, kWarps);
  const size_t first = firstOfThread();
  uint64_t sum = 0;
#pragma unroll
  for (unsigned i = 0; i < kValuesPerThread; ++i) {
    sum += valueAt(call.values, first + size_t{i} * 32);
  }
  const uint64_t total = sumOfBlock(sum, sums);
  if (threadIdx.x == 0) {
    call.tileSums[blockIdx.x] = total;
  }
}

__global__ void __launch_bounds__(kThreads)
    scanValues(const __grid_constant__ Scan call) {
  AUTOMOE_SHARED(uint64_t, tileSums, kWarps);
  AUTOMOE_SHARED(uint64_t, warpSums, kWarps);
  const unsigned lane = threadIdx.x % 32;
  const unsigned warp = threadIdx.x / 32;
  const size_t first = firstOfThread();
  uint64_t before[kValuesPerThread];
  uint64_t sum = 0;  // of the warp so far
#pragma unroll
  for (unsigned i = 0; i < kValuesPerThread; ++i) {
    const uint64_t value = valueAt(call.values, first + size_t{i} * 32);
    uint64_t upTo = value;
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, upTo, step);
      upTo += lane >= step ? other : 0;
    }
    before[i] = sum + upTo - value;
    sum += __shfl_sync(kAllLanes, upTo, 31);
  }
  if (lane == 0) {
    warpSums[warp] = sum;
  }
  uint64_t tiles = 0;
  for (unsigned tile = threadIdx.x; tile < blockIdx.x; tile += kThreads) {
    tiles += call.tileSums[tile];
  }
  uint64_t begin = sumOfBlock(tiles, tileSums);  // waits for warpSums too
#pragma unroll
  for (unsigned w = 0; w < kWarps; ++w) {
    begin += w < warp ? warpSums[w] : 0;
  }
#pragma unroll
  for (unsigned i = 0; i < kValuesPerThread; ++i) {
    const size_t place = first + size_t{i} * 32;
    if (place <= call.values.count) {
      call.values.values[place] = begin + before[i];
    }
  }
}

/// The sum of all has a place too.
unsigned tilesOf(const ScanCounts& call) {
  return blocksFor(call.count + 1, kTileValues, 0);
}

}  // namespace

size_t scratchBytes(const ScanCounts& call) {
  const unsigned tiles = tilesOf(call);
  return tiles == 1 ? 0 : tiles * sizeof(uint64_t);
}

void enqueue(const ScanCounts& call, DeviceStream stream) {
  const Scan scan{call, static_cast<uint64_t*>(call.scratch)};
  const LaunchShape perTile{tilesOf(call), kThreads};
  if (perTile.blocks > 1) {
    launch("sumValues", Kernel<sumValues>(), perTile, stream, scan);
  }
  launch("scanValues", Kernel<scanValues>(), perTile, stream, scan);
}

}  // namespace automoe::kernels
