// SPDX-License-Identifier: Apache-2.0
// CountPlan: reads the ids of all ranks once, brings the entries of each token
// into order, counts rows, and sorts the entries of this node by expert.
#include <stdexcept>
#include <string>

#include "kernels/ids_hash.hpp"
#include "kernels/plan_work.cuh"

namespace automoe::kernels {
namespace {

constexpr size_t kMostWords = 0x7FFFFFFF;
constexpr int64_t kMost = kMostWords;

/// One thread for each rank.
__global__ void __launch_bounds__(kPlanThreads)
    clearSums(const __grid_constant__ PlanWork work) {
  const size_t rank = threadNumber();
  if (rank < static_cast<size_t>(work.call.of.size)) {
    work.call.counts[work.counts.invalidIds + rank] = 0;
    work.call.counts[work.counts.idsHash + 2 * rank] = 0;
    work.call.counts[work.counts.idsHash + 2 * rank + 1] = 0;
  }
}

// Blocks that share the ids of one rank.
constexpr unsigned kHashBlocks = 8;

/// kHashBlocks blocks for each rank.
__global__ void __launch_bounds__(kPlanThreads)
    hashIds(const __grid_constant__ PlanWork work) {
  AUTOMOE_SHARED(uint64_t, sums, kPlanThreads);
  const PlanIds& of = work.call.of;
  const unsigned rank = blockIdx.x / kHashBlocks;
  const unsigned block = blockIdx.x % kHashBlocks;
  const PlanSource& source = of.sources[rank];
  const int64_t end = static_cast<int32_t>(rank) + 1 < of.size
                          ? int64_t{of.sources[rank + 1].tokenBegin}
                          : of.tokens;
  const auto count = static_cast<size_t>((end - source.tokenBegin) * of.topK);
  const std::byte* const ids =
      of.ids.at[source.landing] +
      static_cast<size_t>(source.idsRow * of.topK) * sizeof(int32_t);
  uint64_t sum = 0;
  for (size_t i = block * kPlanThreads + threadIdx.x; i < count;
       i += size_t{kHashBlocks} * kPlanThreads) {
    sum += hashOfId(i, load<int32_t>(ids + i * sizeof(int32_t)));
  }
  sums[threadIdx.x] = sum;
  for (unsigned half = kPlanThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      sums[threadIdx.x] += sums[threadIdx.x + half];
    }
  }
  if (threadIdx.x == 0 && sums[0] != 0) {
    using Word = unsigned long long;
    int32_t* const to = work.call.counts + work.counts.idsHash + 2 * rank;
    atomicAdd(reinterpret_cast<Word*>(to), static_cast<Word>(sums[0]));
  }
}

/// One thread for each slot.
__global__ void __launch_bounds__(kPlanThreads)
    gatherIds(const __grid_constant__ PlanWork work) {
  const size_t slot = threadNumber();
  if (slot >= work.slots) {
    return;
  }
  const PlanIds& of = work.call.of;
  const int32_t token = static_cast<int32_t>(slot) / work.topK;
  const int32_t k = static_cast<int32_t>(slot) - token * work.topK;
  const int32_t number = sourceOf(of, token);
  const PlanSource& source = of.sources[number];
  const int64_t row = int64_t{source.idsRow} + (token - source.tokenBegin);
  const int32_t id = load<int32_t>(
      of.ids.at[source.landing] +
      static_cast<size_t>(row * work.topK + k) * sizeof(int32_t));
  int32_t node = -1;
  int32_t nodeExpert = -1;
  if (id >= 0 && id < of.experts) {
    const int32_t owner = id / work.expertsPerRank;
    node = of.sources[owner].node;
    if (node == of.node) {
      nodeExpert = of.sources[owner].localRank * work.expertsPerRank +
                   (id - owner * work.expertsPerRank);
    }
  }
  if (id < -1 || id >= of.experts) {
    atomicAdd(&work.call.counts[work.counts.invalidIds + number], 1);
  }
  work.nodeExperts[slot] = nodeExpert;
  if (number == of.rank) {
    const int32_t ownSlot = (token - source.tokenBegin) * work.topK + k;
    work.ownIds[ownSlot] = id;
    work.ownNodes[ownSlot] = node;
  }
}

/// One thread for each slot: it finds the slot's spot.
__global__ void __launch_bounds__(kPlanThreads)
    sortSpots(const __grid_constant__ PlanWork work) {
  const size_t slot = threadNumber();
  if (slot >= work.slots) {
    return;
  }
  const PlanIds& of = work.call.of;
  const int32_t token = static_cast<int32_t>(slot) / work.topK;
  const int32_t first = token * work.topK;
  const int32_t k = static_cast<int32_t>(slot) - first;
  const int32_t expert = work.nodeExperts[slot];
  int32_t used = 0;
  int32_t before = 0;  // of the same kind: with an expert here, or without
  for (int32_t i = 0; i < work.topK; ++i) {
    const int32_t other = work.nodeExperts[first + i];
    used += other >= 0 ? 1 : 0;
    const bool isBefore = other < expert || (other == expert && i < k);
    before += (other >= 0) == (expert >= 0) && isBefore ? 1 : 0;
  }
  const int32_t spot = expert >= 0 ? before : used + before;
  work.spotExperts[first + spot] = expert;
  const PlanSource& own = of.sources[of.rank];
  const int32_t ownToken = token - own.tokenBegin;
  if (ownToken >= 0 && ownToken < of.ownTokens) {
    work.ownSpots[ownToken * work.topK + spot] = k;
  }
}

__device__ __forceinline__ uint64_t countsOf(uint64_t rows, int32_t slots) {
  return rows << 32 | static_cast<uint32_t>(slots);
}

__device__ __forceinline__ uint64_t
landCounts(const PlanWork& work, size_t token) {
  const size_t first = token * static_cast<size_t>(work.topK);
  int32_t slots = 0;
  for (int32_t k = 0; k < work.topK; ++k) {
    slots += work.nodeExperts[first + static_cast<size_t>(k)] >= 0 ? 1 : 0;
  }
  return countsOf(slots > 0 ? 1 : 0, slots);
}

__device__ __forceinline__ uint64_t
sendCounts(const PlanWork& work, int32_t node, const int32_t* nodes) {
  int32_t slots = 0;
  for (int32_t k = 0; k < work.topK; ++k) {
    slots += nodes[k] == node ? 1 : 0;
  }
  return countsOf(slots > 0 ? 1 : 0, slots);
}

/// The nodes of an own token.
__device__ __forceinline__ uint64_t
tokenCounts(const PlanWork& work, const int32_t* nodes) {
  uint64_t different = 0;
  for (int32_t k = 0; k < work.topK; ++k) {
    bool isFirst = nodes[k] >= 0;
    for (int32_t i = 0; i < k; ++i) {
      isFirst = isFirst && nodes[i] != nodes[k];
    }
    different += isFirst ? 1 : 0;
  }
  return countsOf(different, 0);
}

/// One thread for each value of `sums`.
__global__ void __launch_bounds__(kPlanThreads)
    countRows(const __grid_constant__ PlanWork work) {
  const size_t place = threadNumber();
  if (place >= work.numSums) {
    return;
  }
  const PlanIds& of = work.call.of;
  const auto tokens = static_cast<size_t>(of.tokens);
  if (place < tokens) {
    work.sums[place] = landCounts(work, place);
    return;
  }
  const auto ownTokens = static_cast<size_t>(of.ownTokens);
  const size_t node = (place - tokens) / ownTokens;
  const size_t token = (place - tokens) - node * ownTokens;
  const int32_t* const nodes =
      work.ownNodes + token * static_cast<size_t>(work.topK);
  work.sums[place] = node < static_cast<size_t>(of.nodes)
                         ? sendCounts(work, static_cast<int32_t>(node), nodes)
                         : tokenCounts(work, nodes);
}

__device__ __forceinline__ void writeBegins(
    const PlanWork& work, size_t place) {
  const PlanIds& of = work.call.of;
  int32_t* const counts = work.call.counts;
  if (place <= static_cast<size_t>(of.nodes)) {
    const RowCounts sent = countsBetween(
        work, sendSum(of, 0, 0), sendSum(of, static_cast<int32_t>(place), 0));
    counts[work.counts.sendBegin + place] = sent.rows;
    counts[work.counts.sendSlotBegin + place] = sent.slots;
  }
  if (place <= static_cast<size_t>(of.size)) {
    const auto end = static_cast<int32_t>(of.tokens);
    const int32_t token = place < static_cast<size_t>(of.size)
                              ? of.sources[place].tokenBegin
                              : end;
    const RowCounts landed = countsBetween(work, 0, landSum(token));
    counts[work.counts.landBegin + place] = landed.rows;
    counts[work.counts.entryBegin + place] = landed.slots;
  }
}

/// One thread for each of the longest of the counts, and in the first block all
/// threads for what found no room.
__global__ void __launch_bounds__(kPlanThreads)
    writeCounts(const __grid_constant__ PlanWork work) {
  AUTOMOE_SHARED(int32_t, dropped, 1);
  const PlanIds& of = work.call.of;
  int32_t* const counts = work.call.counts;
  const size_t place = threadNumber();
  writeBegins(work, place);
  if (place < static_cast<size_t>(of.mates)) {
    const auto mate = static_cast<int32_t>(place);
    counts[work.counts.receiveRows + place] =
        rowBeginOf(work, mate + 1) - rowBeginOf(work, mate);
  }
  if (place < static_cast<size_t>(of.mates * work.expertsPerRank)) {
    const auto expert = static_cast<int32_t>(place);
    counts[work.counts.expertEnds + place] =
        work.ends[place] - rowBeginOf(work, expert / work.expertsPerRank);
  }
  if (blockIdx.x > 0) {
    return;
  }
  if (threadIdx.x == 0) {
    dropped[0] = 0;
  }
  __syncthreads();
  const int32_t* const expertCounts =
      counts + work.counts.expertCounts + of.localRank * work.expertsPerRank;
  for (auto expert = static_cast<int32_t>(threadIdx.x);
       expert < work.ownExperts;
       expert += static_cast<int32_t>(blockDim.x)) {
    const int32_t lost = expertCounts[expert] - keptOf(work, expert);
    if (lost > 0) {
      atomicAdd(dropped, lost);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    counts[work.counts.dropped] = dropped[0];
  }
}

/// But where its counts go.
SortSlots sortOf(const PlanWork& work) {
  SortSlots sort;
  sort.ids = work.spotExperts;
  sort.count = work.slots;
  sort.experts =
      static_cast<size_t>(work.call.of.mates * work.call.of.expertsPerRank);
  sort.align = static_cast<size_t>(work.call.of.align);
  sort.ends = work.ends;
  sort.index = work.spotOfRow;
  sort.rows = work.sortedRows;
  sort.scratch = work.sortScratch;
  return sort;
}

ScanCounts scanOf(const PlanWork& work) {
  return {work.sums, work.numSums, work.scanScratch};
}

[[noreturn]] void refuse(const std::string& what) {
  throw std::invalid_argument("a plan on a device has " + what);
}

void checkRange(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most) {
    refuse(
        std::string(name) + " " + std::to_string(value) + ", expected " +
        std::to_string(least) + " to " + std::to_string(most));
  }
}

void check(const CountPlan& call) {
  const PlanIds& of = call.of;
  checkRange("size", of.size, 1, kMost);
  checkRange("rank", of.rank, 0, of.size - 1);
  checkRange("nodes", of.nodes, 1, of.size);
  checkRange("node", of.node, 0, of.nodes - 1);
  checkRange("mates", of.mates, 1, static_cast<int64_t>(RowBases::kMost) - 1);
  checkRange("localRank", of.localRank, 0, of.mates - 1);
  checkRange("topK", of.topK, 1, kMost);
  checkRange("tokens", of.tokens, 0, kMost / of.topK);
  checkRange("ownTokens", of.ownTokens, 0, of.tokens);
  checkRange("experts", of.experts, 1, kMost);
  checkRange(
      "expertsPerRank",
      of.expertsPerRank,
      (of.experts - 1) / of.size + 1,
      kMost / of.mates);
  checkRange("maxReceiveRows", call.maxReceiveRows, -1, kMost);
  const int64_t places = int64_t{of.mates} * of.expertsPerRank;
  checkRange("align", of.align, 1, 1 + (kMost - of.tokens * of.topK) / places);
}

/// Hands out parts of the scratch, or only counts their bytes.
class Parts {
 public:
  explicit Parts(void* scratch) : scratch_(static_cast<std::byte*>(scratch)) {}

  template <class T>
  T* take(size_t count) {
    const size_t begin = bytes_;
    bytes_ += (count * sizeof(T) + 15) / 16 * 16;
    return scratch_ == nullptr ? nullptr
                               : reinterpret_cast<T*>(scratch_ + begin);
  }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* scratch_;
  size_t bytes_ = 0;
};

PlanWork makeWork(const CountPlan& call, Parts& parts) {
  check(call);
  const PlanIds& of = call.of;
  PlanWork work{call, PlanCounts(of)};
  work.slots = static_cast<size_t>(of.tokens * of.topK);
  work.ownSlots = static_cast<size_t>(of.ownTokens * of.topK);
  work.topK = static_cast<int32_t>(of.topK);
  work.expertsPerRank = static_cast<int32_t>(of.expertsPerRank);
  const int64_t left = of.experts - of.rank * of.expertsPerRank;
  work.ownExperts = static_cast<int32_t>(
      left < 0 ? 0 : (left < of.expertsPerRank ? left : of.expertsPerRank));
  work.numSums = tokenSum(of, of.ownTokens);
  const SortSlots sort = sortOf(work);
  work.sortedRows = work.slots + sort.experts * (sort.align - 1);
  work.sums = parts.take<uint64_t>(work.numSums + 1);
  work.nodeExperts = parts.take<int32_t>(work.slots);
  work.ownIds = parts.take<int32_t>(work.ownSlots);
  work.ownNodes = parts.take<int32_t>(work.ownSlots);
  work.spotExperts = parts.take<int32_t>(work.slots);
  work.ownSpots = parts.take<int32_t>(work.ownSlots);
  work.ends = parts.take<int32_t>(sort.experts);
  work.spotOfRow = parts.take<int32_t>(work.sortedRows);
  work.rowOfSpot = parts.take<int32_t>(work.slots);
  work.scanScratch = parts.take<std::byte>(scratchBytes(scanOf(work)));
  work.sortScratch = parts.take<std::byte>(scratchBytes(sort));
  return work;
}

}  // namespace

PlanWork workOf(const CountPlan& call) {
  if (call.of.sources == nullptr || call.counts == nullptr ||
      call.scratch == nullptr) {
    refuse("no sources, counts or scratch, expected memory of the device");
  }
  Parts parts(call.scratch);
  return makeWork(call, parts);
}

size_t scratchBytes(const CountPlan& call) {
  Parts parts(nullptr);
  makeWork(call, parts);
  return parts.bytes();
}

void enqueue(const CountPlan& call, DeviceStream stream) {
  const PlanWork work = workOf(call);
  const auto launchFor = [&](const char* name, auto kernel, size_t threads) {
    if (threads > 0) {
      const unsigned blocks = blocksFor(threads, kPlanThreads, 0);
      launch(name, kernel, {blocks, kPlanThreads}, stream, work);
    }
  };
  launchFor(
      "clearSums", Kernel<clearSums>(), static_cast<size_t>(call.of.size));
  launchFor("gatherIds", Kernel<gatherIds>(), work.slots);
  if (work.slots > 0) {
    const auto blocks = static_cast<unsigned>(call.of.size) * kHashBlocks;
    launch("hashIds", Kernel<hashIds>(), {blocks, kPlanThreads}, stream, work);
  }
  launchFor("sortSpots", Kernel<sortSpots>(), work.slots);
  launchFor("countRows", Kernel<countRows>(), work.numSums);
  enqueue(scanOf(work), stream);
  SortSlots sort = sortOf(work);
  sort.counts = call.counts + work.counts.expertCounts;
  enqueue(sort, stream);
  launchFor("writeCounts", Kernel<writeCounts>(), work.counts.words);
}

}  // namespace automoe::kernels
