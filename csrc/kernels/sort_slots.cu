// SPDX-License-Identifier: Apache-2.0
// CountIds and SortSlots. Slots are cut into tiles of one block each: a tile's
// ids are counted, the counts of each expert are summed over the tiles before,
// and then every warp gives places to its slots in their order. So the order of
// the slots holds, and no result depends on which thread is first. One tile
// needs one launch.
#include <stdexcept>
#include <string>

#include "kernels/cuda_language.cuh"

namespace automoe::kernels {
namespace {

constexpr unsigned kWarps = 8;
constexpr unsigned kThreads = kWarps * 32;
constexpr unsigned kIdsPerThread = 8;
constexpr unsigned kTileIds = kThreads * kIdsPerThread;
// Experts are handled in ranges whose counts fit the shared memory.
constexpr unsigned kRange = 1024;
constexpr unsigned kExpertsPerThread = kRange / kThreads;
constexpr unsigned kAllLanes = ~0U;

struct Sort {
  SortSlots slots;
  unsigned tiles;
  int32_t* tileCounts;  // (experts, tiles)
};

struct Count {
  CountIds ids;
  size_t idsPerBlock;
};

__device__ __forceinline__ unsigned rangeSize(size_t first, size_t experts) {
  const size_t left = experts - first;
  return left < kRange ? static_cast<unsigned>(left) : kRange;
}

/// An id's place in the range of experts from `first` on, or kRange.
__device__ __forceinline__ unsigned placeIn(
    int32_t id, size_t first, unsigned size) {
  const int64_t place = static_cast<int64_t>(id) - static_cast<int64_t>(first);
  return place >= 0 && place < static_cast<int64_t>(size)
             ? static_cast<unsigned>(place)
             : kRange;
}

/// Counts ids [begin, end) of the range; all threads of the block take part.
__device__ __forceinline__ void countRange(
    const int32_t* ids,
    size_t begin,
    size_t end,
    size_t first,
    unsigned size,
    int32_t* counts) {
  for (unsigned place = threadIdx.x; place < size; place += blockDim.x) {
    counts[place] = 0;
  }
  __syncthreads();
  for (size_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const unsigned place = placeIn(ids[i], first, size);
    if (place < kRange) {
      atomicAdd(&counts[place], 1);
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads)
    clearCounts(const __grid_constant__ CountIds call) {
  const size_t expert =
      static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (expert < call.experts) {
    call.counts[expert] = 0;
  }
}

__global__ void __launch_bounds__(kThreads)
    countIds(const __grid_constant__ Count call) {
  AUTOMOE_SHARED(int32_t, counts, kRange);
  const CountIds& ids = call.ids;
  const size_t begin = blockIdx.x * call.idsPerBlock;
  const size_t last = begin + call.idsPerBlock;
  const size_t end = last < ids.count ? last : ids.count;
  for (size_t first = 0; first < ids.experts; first += kRange) {
    const unsigned size = rangeSize(first, ids.experts);
    countRange(ids.ids, begin, end, first, size, counts);
    for (unsigned place = threadIdx.x; place < size; place += blockDim.x) {
      if (gridDim.x == 1) {
        ids.counts[first + place] = counts[place];
      } else if (counts[place] != 0) {
        atomicAdd(&ids.counts[first + place], counts[place]);
      }
    }
    __syncthreads();
  }
}

/// Marks all rows as padding; slots are placed afterwards.
__device__ __forceinline__ void clearIndex(const SortSlots& call) {
  const size_t step = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t row = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       row < call.rows;
       row += step) {
    call.index[row] = -1;
  }
}

__global__ void __launch_bounds__(kThreads)
    countTiles(const __grid_constant__ Sort call) {
  AUTOMOE_SHARED(int32_t, counts, kRange);
  const SortSlots& slots = call.slots;
  clearIndex(slots);
  const size_t begin = static_cast<size_t>(blockIdx.x) * kTileIds;
  const size_t last = begin + kTileIds;
  const size_t end = last < slots.count ? last : slots.count;
  for (size_t first = 0; first < slots.experts; first += kRange) {
    const unsigned size = rangeSize(first, slots.experts);
    countRange(slots.ids, begin, end, first, size, counts);
    for (unsigned place = threadIdx.x; place < size; place += blockDim.x) {
      call.tileCounts[(first + place) * call.tiles + blockIdx.x] =
          counts[place];
    }
    __syncthreads();
  }
}

/// The sum over the lanes up to this one.
__device__ __forceinline__ int32_t sumUpTo(unsigned lane, int32_t value) {
#pragma unroll
  for (unsigned step = 1; step < 32; step *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, value, step);
    value += lane >= step ? other : 0;
  }
  return value;
}

/// Each warp turns the tile counts of an expert into the sums of those before.
__global__ void __launch_bounds__(kThreads)
    sumTiles(const __grid_constant__ Sort call) {
  const unsigned lane = threadIdx.x % 32;
  const size_t expert =
      static_cast<size_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (expert >= call.slots.experts) {
    return;
  }
  int32_t* const counts = call.tileCounts + expert * call.tiles;
  int32_t before = 0;
  for (unsigned begin = 0; begin < call.tiles; begin += 32) {
    const unsigned tile = begin + lane;
    const int32_t count = tile < call.tiles ? counts[tile] : 0;
    const int32_t sum = sumUpTo(lane, count);
    if (tile < call.tiles) {
      counts[tile] = before + sum - count;
    }
    before += __shfl_sync(kAllLanes, sum, 31);
  }
  if (lane == 0) {
    call.slots.counts[expert] = before;
  }
}

__device__ __forceinline__ int32_t padded(int32_t count, size_t align) {
  const size_t steps = (static_cast<size_t>(count) + align - 1) / align;
  return static_cast<int32_t>(steps * align);
}

/// The sum of all threads before this one; `total` becomes that of the block.
__device__ __forceinline__ int32_t
sumBefore(int32_t value, int32_t* warpSums, int32_t& total) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned warp = threadIdx.x / 32;
  const int32_t sum = sumUpTo(lane, value);
  if (lane == 31) {
    warpSums[warp] = sum;
  }
  __syncthreads();
  int32_t before = sum - value;
  total = 0;
#pragma unroll
  for (unsigned w = 0; w < kWarps; ++w) {
    before += w < warp ? warpSums[w] : 0;
    total += warpSums[w];
  }
  return before;
}

/// Experts [first, first + size): from the warps' counts in `next` to the row
/// where each warp's first slot of each expert goes. Returns the rows of all.
__device__ __forceinline__ int32_t placeWarps(
    const Sort& call,
    size_t first,
    unsigned size,
    int32_t begin,
    int32_t* next,
    int32_t* warpSums) {
  const SortSlots& slots = call.slots;
  int32_t counts[kExpertsPerThread];
  int32_t rows = 0;
#pragma unroll
  for (unsigned i = 0; i < kExpertsPerThread; ++i) {
    const unsigned place = threadIdx.x * kExpertsPerThread + i;
    counts[i] = 0;
    if (place < size && call.tiles > 1) {
      counts[i] = slots.counts[first + place];
    } else if (place < size) {
      for (unsigned warp = 0; warp < kWarps; ++warp) {
        counts[i] += next[warp * kRange + place];
      }
    }
    rows += padded(counts[i], slots.align);
  }
  int32_t total;
  int32_t row = begin + sumBefore(rows, warpSums, total);
#pragma unroll
  for (unsigned i = 0; i < kExpertsPerThread; ++i) {
    const unsigned place = threadIdx.x * kExpertsPerThread + i;
    if (place >= size) {
      break;
    }
    const size_t expert = first + place;
    int32_t to = row;
    if (call.tiles > 1) {
      to += call.tileCounts[expert * call.tiles + blockIdx.x];
    }
    for (unsigned warp = 0; warp < kWarps; ++warp) {
      const int32_t count = next[warp * kRange + place];
      next[warp * kRange + place] = to;
      to += count;
    }
    row += padded(counts[i], slots.align);
    if (call.tiles == 1) {
      slots.counts[expert] = counts[i];
    }
    if (blockIdx.x == 0) {
      slots.ends[expert] = row;
    }
  }
  return total;
}

/// Gives rows to one slot of each lane, in the order of the lanes.
__device__ __forceinline__ void placeSlot(
    const SortSlots& call, size_t slot, unsigned place, int32_t* next) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned same = __match_any_sync(kAllLanes, place);
  const int before = __popc(same & ((1U << lane) - 1));
  int32_t row = 0;
  if (place < kRange) {
    row = next[place] + before;
  }
  __syncwarp();
  if (place < kRange && before == 0) {
    next[place] += __popc(same);
  }
  __syncwarp();
  if (place < kRange && static_cast<size_t>(row) < call.rows) {
    call.index[row] = static_cast<int32_t>(slot);
  }
}

__global__ void __launch_bounds__(kThreads)
    placeSlots(const __grid_constant__ Sort call) {
  AUTOMOE_SHARED(int32_t, next, kWarps * kRange);
  AUTOMOE_SHARED(int32_t, warpSums, kWarps);
  const SortSlots& slots = call.slots;
  const unsigned warp = threadIdx.x / 32;
  const size_t slot = static_cast<size_t>(blockIdx.x) * kTileIds +
                      warp * (kIdsPerThread * 32) + threadIdx.x % 32;
  int32_t ids[kIdsPerThread];
#pragma unroll
  for (unsigned i = 0; i < kIdsPerThread; ++i) {
    const size_t at = slot + size_t{i} * 32;
    ids[i] = at < slots.count ? slots.ids[at] : -1;
  }
  if (call.tiles == 1) {
    clearIndex(slots);
  }
  int32_t begin = 0;
  for (size_t first = 0; first < slots.experts; first += kRange) {
    const unsigned size = rangeSize(first, slots.experts);
    for (unsigned i = threadIdx.x; i < kWarps * kRange; i += kThreads) {
      next[i] = 0;
    }
    __syncthreads();
#pragma unroll
    for (unsigned i = 0; i < kIdsPerThread; ++i) {
      const unsigned place = placeIn(ids[i], first, size);
      if (place < kRange) {
        atomicAdd(&next[warp * kRange + place], 1);
      }
    }
    __syncthreads();
    begin += placeWarps(call, first, size, begin, next, warpSums);
    __syncthreads();
#pragma unroll
    for (unsigned i = 0; i < kIdsPerThread; ++i) {
      placeSlot(
          slots,
          slot + size_t{i} * 32,
          placeIn(ids[i], first, size),
          next + warp * kRange);
    }
    __syncthreads();
  }
}

unsigned tilesOf(const SortSlots& call) {
  const size_t tiles = (call.count + kTileIds - 1) / kTileIds;
  return tiles == 0 ? 1 : static_cast<unsigned>(tiles);
}

void checkRows(const SortSlots& call) {
  constexpr size_t kMost = 0x7FFFFFFF;
  if (call.align < 1 || call.align > kMost || call.count > kMost ||
      call.experts > kMost ||
      call.count + call.experts * (call.align - 1) > kMost) {
    throw std::invalid_argument(
        "SortSlots has " + std::to_string(call.count) + " slots, " +
        std::to_string(call.experts) + " experts and align " +
        std::to_string(call.align) +
        ", expected align of at least 1 and at most " + std::to_string(kMost) +
        " rows with all padding: lower align");
  }
}

}  // namespace

size_t scratchBytes(const SortSlots& call) {
  const unsigned tiles = tilesOf(call);
  return tiles == 1 ? 0 : call.experts * tiles * sizeof(int32_t);
}

void enqueue(const SortSlots& call, DeviceStream stream) {
  checkRows(call);
  const Sort sort{call, tilesOf(call), static_cast<int32_t*>(call.scratch)};
  const LaunchShape perTile{sort.tiles, kThreads};
  if (sort.tiles > 1) {
    launch("countTiles", Kernel<countTiles>(), perTile, stream, sort);
    if (call.experts > 0) {
      const unsigned blocks = blocksFor(call.experts, kWarps, 0);
      launch("sumTiles", Kernel<sumTiles>(), {blocks, kThreads}, stream, sort);
    }
  }
  launch("placeSlots", Kernel<placeSlots>(), perTile, stream, sort);
}

void enqueue(const CountIds& call, DeviceStream stream) {
  constexpr size_t kIdsOfOneBlock = 8192;
  if (call.experts == 0) {
    return;
  }
  Count count{call, kIdsOfOneBlock};
  unsigned blocks = blocksFor(call.count, kIdsOfOneBlock, 0);
  if (blocks > 1) {
    const unsigned clearing = blocksFor(call.experts, kThreads, 0);
    launch(
        "clearCounts",
        Kernel<clearCounts>(),
        {clearing, kThreads},
        stream,
        call);
  } else {
    blocks = 1;
  }
  launch("countIds", Kernel<countIds>(), {blocks, kThreads}, stream, count);
}

}  // namespace automoe::kernels
