// SPDX-License-Identifier: Apache-2.0
// ScaleAndDot: a team's threads hold the lanes of a row's dot product, a piece
// of 16 bytes each; so every thread takes each team's stride of the row.
#include <bit>

#include "kernels/pieces.cuh"

namespace automoe::kernels {
namespace {

constexpr unsigned kAllLanes = ~0U;
// Narrow units take more registers.
template <size_t kUnit>
constexpr size_t kStepsAhead = kUnit == 16 ? 4 : 2;
constexpr unsigned kThreads = 128;
// With a fixed number of blocks, each is as large as the registers allow.
constexpr unsigned kMostThreads = 256;

struct Scale {
  ScaleAndDot rows;
  size_t rowBytes;
  bool scales;  // else only dots are wanted
};

/// What one thread holds of a row of this type.
template <DType kDType>
struct Lanes {
  using Stored = typename Format<kDType>::Stored;
  using Sum = typename Format<kDType>::Sum;
  static constexpr size_t kLanes = kPieceBytes / sizeof(Stored);
  static constexpr unsigned kTeamThreads = kDotLanes<kDType> / kLanes;
  static constexpr unsigned kTeamShift = std::countr_zero(kTeamThreads);
  static constexpr size_t kStride = kTeamThreads * kPieceBytes;
};

template <DType kDType, size_t kUnit>
__device__ __forceinline__ void addProducts(
    typename Format<kDType>::Sum* lanes,
    const PieceOf<kUnit>& grads,
    const PieceOf<kUnit>& values) {
  using Of = Lanes<kDType>;
  typename Of::Stored a[Of::kLanes];
  typename Of::Stored b[Of::kLanes];
  memcpy(a, &grads, kPieceBytes);
  memcpy(b, &values, kPieceBytes);
#pragma unroll
  for (size_t i = 0; i < Of::kLanes; ++i) {
    lanes[i] +=
        multiply(Format<kDType>::widen(a[i]), Format<kDType>::widen(b[i]));
  }
}

template <DType kDType, size_t kUnit>
__device__ __forceinline__ PieceOf<kUnit> scaledPiece(
    const PieceOf<kUnit>& grads, typename Format<kDType>::Sum weight) {
  using Of = Lanes<kDType>;
  typename Of::Stored stored[Of::kLanes];
  memcpy(stored, &grads, kPieceBytes);
#pragma unroll
  for (size_t i = 0; i < Of::kLanes; ++i) {
    stored[i] = Format<kDType>::round(
        multiply(weight, Format<kDType>::widen(stored[i])));
  }
  PieceOf<kUnit> piece;
  memcpy(&piece, stored, kPieceBytes);
  return piece;
}

/// Joins the lanes of the team's threads, then those of the thread, as
/// kDotLanes says. The first thread of the team gets the sum.
template <DType kDType>
__device__ __forceinline__ typename Format<kDType>::Sum joinLanes(
    typename Format<kDType>::Sum* lanes) {
  using Of = Lanes<kDType>;
#pragma unroll
  for (unsigned step = Of::kTeamThreads / 2; step > 0; step /= 2) {
#pragma unroll
    for (size_t i = 0; i < Of::kLanes; ++i) {
      lanes[i] += __shfl_down_sync(
          kAllLanes, lanes[i], step, static_cast<int>(Of::kTeamThreads));
    }
  }
#pragma unroll
  for (size_t n = Of::kLanes / 2; n > 0; n /= 2) {
#pragma unroll
    for (size_t i = 0; i < n; ++i) {
      lanes[i] += lanes[i + n];
    }
  }
  return lanes[0];
}

/// The pieces of one thread from byte `begin` of the row on.
template <DType kDType, size_t kUnit>
__device__ __forceinline__ void scaleAndDotPieces(
    const Scale& call,
    size_t row,
    size_t begin,
    bool isPadding,
    typename Format<kDType>::Sum weight,
    typename Format<kDType>::Sum* lanes) {
  using Of = Lanes<kDType>;
  const ScaleAndDot& rows = call.rows;
  const size_t offset = row * call.rowBytes;
  const bool readsValues = rows.dots != nullptr && !isPadding;
  PieceOf<kUnit> grads[kStepsAhead<kUnit>];
  PieceOf<kUnit> values[kStepsAhead<kUnit>];
#pragma unroll
  for (size_t i = 0; i < kStepsAhead<kUnit>; ++i) {
    const size_t at = begin + i * Of::kStride;
    const size_t bytes = bytesAt(at, call.rowBytes);
    grads[i] =
        loadPiece<kUnit, true>(rows.grads + offset + at, isPadding ? 0 : bytes);
    values[i] = loadPiece<kUnit, true>(
        rows.values + offset + at, readsValues ? bytes : 0);
  }
#pragma unroll
  for (size_t i = 0; i < kStepsAhead<kUnit>; ++i) {
    const size_t at = begin + i * Of::kStride;
    addProducts<kDType, kUnit>(lanes, grads[i], values[i]);
    if (rows.weights != nullptr) {
      grads[i] = scaledPiece<kDType, kUnit>(grads[i], weight);
    }
    storePiece(
        rows.scaled + offset + at,
        grads[i],
        call.scales ? bytesAt(at, call.rowBytes) : 0);
  }
}

template <DType kDType, size_t kUnit>
__global__ void __launch_bounds__(kMostThreads)
    scaleAndDot(const __grid_constant__ Scale call) {
  using Of = Lanes<kDType>;
  using Sum = typename Of::Sum;
  const ScaleAndDot& rows = call.rows;
  const Team team = teamOf(Of::kTeamShift);
  // The threads of a warp stay together, as its teams join at the same time.
  const size_t teamOfWarp = threadIdx.x % 32 / Of::kTeamThreads;
  for (size_t first = team.item - teamOfWarp; first < rows.count;
       first += team.step) {
    const size_t row = first + teamOfWarp;
    const bool isRow = row < rows.count;
    const bool isPadding =
        isRow && rows.index != nullptr && rows.index[row] < 0;
    Sum weight = 0;
    if (isRow && !isPadding && rows.weights != nullptr) {
      weight = loadAnywhere<Sum>(
          static_cast<const std::byte*>(rows.weights) + row * sizeof(Sum));
    }
    Sum lanes[Of::kLanes] = {};
    if (isRow) {
      for (size_t at = team.rank * kPieceBytes; at < call.rowBytes;
           at += kStepsAhead<kUnit> * Of::kStride) {
        scaleAndDotPieces<kDType, kUnit>(
            call, row, at, isPadding, weight, lanes);
      }
    }
    const Sum dot = joinLanes<kDType>(lanes);
    if (isRow && team.rank == 0 && rows.dots != nullptr) {
      static_cast<Sum*>(rows.dots)[row] = withOneNaN(dot);
    }
  }
}

template <DType kDType>
void scaleAndDotOf(const ScaleAndDot& rows, DeviceStream stream) {
  Scale call{
      rows, rows.elements * elementBytes(kDType), rows.scaled != nullptr};
  // Neither is read or written then; it is an address to count from.
  if (!call.scales) {
    call.rows.scaled = static_cast<std::byte*>(rows.dots);
  }
  if (rows.dots == nullptr) {
    call.rows.values = rows.grads;
  }
  Alignment alignment;
  alignment.add(rows.scaled);
  alignment.add(rows.grads);
  alignment.add(call.rows.values);
  alignment.add(call.rowBytes);
  alignment.withUnit<elementBytes(kDType)>([&](auto unit) {
    const unsigned threads = rows.maxBlocks > 0 ? kMostThreads : kThreads;
    const unsigned blocks = blocksFor(
        rows.count, threads / Lanes<kDType>::kTeamThreads, rows.maxBlocks);
    launch(
        "scaleAndDot",
        Kernel<scaleAndDot<kDType, unit>>(),
        {blocks, threads},
        stream,
        call);
  });
}

}  // namespace

void enqueue(const ScaleAndDot& call, DeviceStream stream) {
  if (call.count == 0 || (call.scaled == nullptr && call.dots == nullptr)) {
    return;
  }
  withDType(call.dtype, [&](auto dtype) {
    scaleAndDotOf<decltype(dtype)::value>(call, stream);
  });
}

}  // namespace automoe::kernels
