// SPDX-License-Identifier: Apache-2.0
// GatherRows: a team of threads takes a part of a row, with all of its loads in
// flight before the first store.
#include "kernels/pieces.cuh"

namespace automoe::kernels {
namespace {

constexpr size_t kPiecesPerThread = 4;
// With few blocks, each is as large as the registers allow.
template <size_t kUnit>
constexpr unsigned kMostThreads = kUnit >= 4 ? 1024 : 512;

struct Gather {
  GatherRows rows;
  unsigned teamShift;
  size_t parts;  // of a row
};

template <size_t kUnit>
__device__ __forceinline__ void gatherPart(
    const GatherRows& call, size_t row, size_t begin, unsigned step) {
  const int64_t from =
      call.index == nullptr ? static_cast<int64_t>(row) : call.index[row];
  const int32_t base = call.base == nullptr ? 0 : call.base[row];
  const size_t stride = size_t{step} * kPieceBytes;
  std::byte* const to = call.to + row * call.rowBytes;
  PieceOf<kUnit> pieces[kPiecesPerThread];
  const bool isRow = from >= 0;
  const std::byte* const source =
      call.from.at[isRow ? base : 0] +
      (isRow ? static_cast<size_t>(from) : 0) * call.rowBytes;
#pragma unroll
  for (size_t i = 0; i < kPiecesPerThread; ++i) {
    const size_t at = begin + i * stride;
    pieces[i] = loadPiece<kUnit, false>(
        source + at, isRow ? bytesAt(at, call.rowBytes) : 0);
  }
#pragma unroll
  for (size_t i = 0; i < kPiecesPerThread; ++i) {
    const size_t at = begin + i * stride;
    storePiece(to + at, pieces[i], bytesAt(at, call.rowBytes));
  }
}

template <size_t kUnit>
__global__ void __launch_bounds__(kMostThreads<kUnit>)
    gatherRows(const __grid_constant__ Gather call) {
  const Team team = teamOf(call.teamShift);
  const unsigned teamThreads = 1U << call.teamShift;
  const size_t partBytes = teamThreads * kPiecesPerThread * kPieceBytes;
  for (size_t item = team.item; item < call.rows.count * call.parts;
       item += team.step) {
    const size_t row = call.parts == 1 ? item : item / call.parts;
    const size_t begin =
        (item - row * call.parts) * partBytes + team.rank * kPieceBytes;
    gatherPart<kUnit>(call.rows, row, begin, teamThreads);
  }
}

}  // namespace

void enqueue(const GatherRows& call, DeviceStream stream) {
  if (call.count == 0 || call.rowBytes == 0) {
    return;
  }
  const size_t pieces = piecesOf(call.rowBytes);
  Gather gather{call, teamShiftFor(pieces, kPiecesPerThread), 0};
  const size_t partPieces = kPiecesPerThread << gather.teamShift;
  gather.parts = (pieces + partPieces - 1) / partPieces;
  Alignment alignment;
  alignment.add(call.to);
  alignment.add(call.rowBytes);
  alignment.add(call.from);
  alignment.withUnit<1>([&](auto unit) {
    const unsigned threads = call.maxBlocks > 0 ? kMostThreads<unit> : 256;
    const unsigned blocks = blocksFor(
        call.count * gather.parts, threads >> gather.teamShift, call.maxBlocks);
    launch(
        "gatherRows",
        Kernel<gatherRows<unit>>(),
        {blocks, threads},
        stream,
        gather);
  });
}

}  // namespace automoe::kernels
