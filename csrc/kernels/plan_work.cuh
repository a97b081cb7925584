// SPDX-License-Identifier: Apache-2.0
// What the kernels of a plan share: the lists that they leave to each other in
// the scratch, and how those are read.
#pragma once

#include "kernels/cuda_language.cuh"
#include "kernels/plan_kernels.hpp"

namespace automoe::kernels {

/// The (token, k) of all ranks are numbered as *slots*, the own ones as *own
/// slots* from 0 on. A token has topK *spots*, numbered as slots are: first
/// those of its entries on this node, by (expert, k), then free ones.
///
/// `sums` has three parts: one value for each token of all ranks (what lands
/// on this node), for each (node, own token) (what is sent), and for each own
/// token. A value counts rows in its upper half and slots in its lower one; of
/// an own token, nodes. Then each is the sum of those before.
struct PlanWork {
  CountPlan call;
  PlanCounts counts;  // where they begin in call.counts
  size_t slots = 0;   // of all ranks
  size_t ownSlots = 0;
  int32_t topK = 0;
  int32_t expertsPerRank = 0;
  int32_t ownExperts = 0;
  size_t numSums = 0;     // without the last, which is the sum of all
  size_t sortedRows = 0;  // at most: receive rows of all ranks of this node

  // (numSums + 1,)
  uint64_t* sums = nullptr;
  // (slots,) the number of the slot's expert on this node, or -1.
  int32_t* nodeExperts = nullptr;
  // (ownSlots,) as they came.
  int32_t* ownIds = nullptr;
  // (ownSlots,) where the slot's expert is; -1: it has none.
  int32_t* ownNodes = nullptr;
  // (slots,) nodeExperts by spot.
  int32_t* spotExperts = nullptr;
  // (ownSlots,) the k of each own spot.
  int32_t* ownSpots = nullptr;
  // (mates * expertsPerRank,) where the sorted rows of each expert end.
  int32_t* ends = nullptr;
  // (sortedRows,) by (expert, spot), or -1 for padding.
  int32_t* spotOfRow = nullptr;
  // (slots,) the receive row at the rank of the expert, or -1: dropped. Only
  // set where an entry is.
  int32_t* rowOfSpot = nullptr;
  void* scanScratch = nullptr;
  void* sortScratch = nullptr;
};

constexpr unsigned kPlanThreads = 256;

/// Checks the call; throws std::invalid_argument.
PlanWork workOf(const CountPlan& call);

__device__ __forceinline__ size_t threadNumber() {
  return static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

/// What a part of `sums` counts.
struct RowCounts {
  int32_t rows;
  int32_t slots;
};

/// The counts of sums [first, last).
__device__ __forceinline__ RowCounts
countsBetween(const PlanWork& work, size_t first, size_t last) {
  // Modulo 2^32 in each half: all three parts together may count more.
  const uint64_t from = work.sums[first];
  const uint64_t to = work.sums[last];
  return {
      static_cast<int32_t>(
          static_cast<uint32_t>(to >> 32) - static_cast<uint32_t>(from >> 32)),
      static_cast<int32_t>(
          static_cast<uint32_t>(to) - static_cast<uint32_t>(from))};
}

// Places in `sums`.

/// What lands of the tokens before.
__device__ __forceinline__ size_t landSum(int32_t token) {
  return static_cast<size_t>(token);
}
/// What is sent to the nodes before, and to this one of the own tokens before.
__host__ __device__ __forceinline__ size_t
sendSum(const PlanIds& of, int32_t node, int64_t ownToken) {
  return static_cast<size_t>(of.tokens + node * of.ownTokens + ownToken);
}
__host__ __device__ __forceinline__ size_t
tokenSum(const PlanIds& of, int64_t ownToken) {
  return sendSum(of, of.nodes, ownToken);
}

/// The rank that has a token.
__device__ __forceinline__ int32_t sourceOf(const PlanIds& of, int32_t token) {
  int32_t low = 0;
  int32_t high = of.size;
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    if (of.sources[middle].tokenBegin <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Where the rows of a rank of this node begin in the sorted rows.
__device__ __forceinline__ int32_t
rowBeginOf(const PlanWork& work, int32_t localRank) {
  return localRank == 0 ? 0 : work.ends[localRank * work.expertsPerRank - 1];
}

__device__ __forceinline__ int32_t clipRow(const PlanWork& work, int32_t row) {
  const int64_t most = work.call.maxReceiveRows;
  return most >= 0 && row > most ? static_cast<int32_t>(most) : row;
}

/// The entries of an own expert that found room.
__device__ __forceinline__ int32_t
keptOf(const PlanWork& work, int32_t expert) {
  const int32_t first = work.call.of.localRank * work.expertsPerRank;
  const int32_t at = first + expert;
  const int32_t rank = rowBeginOf(work, work.call.of.localRank);
  const int32_t begin = (at == 0 ? 0 : work.ends[at - 1]) - rank;
  const int32_t count =
      work.call.counts[work.counts.expertCounts + static_cast<size_t>(at)];
  return clipRow(work, begin + count) - clipRow(work, begin);
}

}  // namespace automoe::kernels
