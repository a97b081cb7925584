// SPDX-License-Identifier: Apache-2.0
// SameRows: a warp for each pair. ProbeRows: a thread for each word of a probe.
#include "kernels/pieces.cuh"

namespace automoe::kernels {
namespace {

constexpr size_t kPiecesPerThread = 2;
constexpr unsigned kAllLanes = ~0U;
constexpr unsigned kProbeShift = 3;
constexpr unsigned kProbeThreads = 1U << kProbeShift;

template <size_t kUnit>
__device__ __forceinline__ bool isSamePiece(
    const std::byte* a, const std::byte* b, size_t bytes) {
  const PieceOf<kUnit> x = loadPiece<kUnit, false>(a, bytes);
  const PieceOf<kUnit> y = loadPiece<kUnit, false>(b, bytes);
  return ((x.whole.x ^ y.whole.x) | (x.whole.y ^ y.whole.y) |
          (x.whole.z ^ y.whole.z) | (x.whole.w ^ y.whole.w)) == 0;
}

template <size_t kUnit>
__global__ void __launch_bounds__(1024)
    sameRows(const __grid_constant__ SameRows call) {
  constexpr size_t kStride = 32 * kPieceBytes;
  const Team team = teamOf(5);
  for (size_t pair = team.item; pair < call.count; pair += team.step) {
    const int32_t first = call.first[pair];
    const int32_t second = call.second[pair];
    bool isSame = first >= 0 && second >= 0;
    const size_t end = isSame ? call.rowBytes : 0;
    const std::byte* const a =
        call.a + (isSame ? static_cast<size_t>(first) * call.rowBytes : 0);
    const std::byte* const b =
        call.b + (isSame ? static_cast<size_t>(second) * call.rowBytes : 0);
    for (size_t begin = 0; begin < end; begin += kPiecesPerThread * kStride) {
#pragma unroll
      for (size_t i = 0; i < kPiecesPerThread; ++i) {
        const size_t at = begin + i * kStride + team.rank * kPieceBytes;
        isSame = isSamePiece<kUnit>(a + at, b + at, bytesAt(at, end)) && isSame;
      }
      if (__any_sync(kAllLanes, isSame ? 0 : 1) != 0) {
        isSame = false;
        break;
      }
    }
    if (team.rank == 0) {
      call.same[pair] = isSame ? 1 : 0;
    }
  }
}

__global__ void __launch_bounds__(1024)
    probeRows(const __grid_constant__ ProbeRows call) {
  const Team team = teamOf(kProbeShift);
  const size_t teamOfWarp = threadIdx.x % 32 / kProbeThreads;
  const size_t words = probeWords(call.rowBytes);
  for (size_t first = team.item - teamOfWarp; first < call.count;
       first += team.step) {
    const size_t row = first + teamOfWarp;
    uint64_t word = 0;
    if (row < call.count && team.rank < words) {
      const std::byte* const from = call.rows + row * call.rowBytes;
      if (call.rowBytes >= sizeof(word)) {
        word = loadAnywhere<uint64_t>(
            from + probeWordAt(call.rowBytes, words, team.rank));
      } else {
        for (size_t i = 0; i < call.rowBytes; ++i) {
          word |= static_cast<uint64_t>(from[i]) << (8 * i);
        }
      }
    }
    uint64_t hash = call.rowBytes;
    for (size_t i = 0; i < words; ++i) {
      hash = mixProbe(
          hash,
          __shfl_sync(
              kAllLanes,
              word,
              static_cast<int>(i),
              static_cast<int>(kProbeThreads)));
    }
    if (row < call.count && team.rank == 0) {
      call.probes[row] = hash;
    }
  }
}

}  // namespace

void enqueue(const SameRows& call, DeviceStream stream) {
  if (call.count == 0) {
    return;
  }
  const unsigned threads = blockThreadsFor(call.maxBlocks);
  const LaunchShape shape{
      blocksFor(call.count, threads / 32, call.maxBlocks), threads};
  Alignment alignment;
  alignment.add(call.a);
  alignment.add(call.b);
  alignment.add(call.rowBytes);
  alignment.withUnit<1>([&](auto unit) {
    launch("sameRows", Kernel<sameRows<unit>>(), shape, stream, call);
  });
}

void enqueue(const ProbeRows& call, DeviceStream stream) {
  if (call.count == 0) {
    return;
  }
  const unsigned threads = blockThreadsFor(call.maxBlocks);
  const LaunchShape shape{
      blocksFor(call.count, threads / kProbeThreads, call.maxBlocks), threads};
  launch("probeRows", Kernel<probeRows>(), shape, stream, call);
}

}  // namespace automoe::kernels
