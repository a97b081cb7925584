// SPDX-License-Identifier: Apache-2.0
// ReduceRows: each thread sums the same few elements of all terms of a row. The
// order of a sum is fixed, so several terms are loaded ahead of it.
#include <stdexcept>

#include "kernels/pieces.cuh"

namespace automoe::kernels {
namespace {

constexpr size_t kPiecesPerThread = 2;
// Single bytes take too many registers for more.
template <size_t kUnit>
constexpr int32_t kTermsAhead = kUnit == 1 ? 1 : 4;
// With a fixed number of blocks, each is as large as the registers allow.
template <size_t kUnit>
constexpr unsigned kMostBlockThreads = kUnit == 16 ? 512 : 256;

struct Reduce {
  ReduceRows rows;
  size_t rowBytes;
  unsigned teamShift;
  size_t parts;  // of a row
};

/// The elements of one thread, as they are summed.
template <DType kDType>
struct Sums {
  using Stored = typename Format<kDType>::Stored;
  using Sum = typename Format<kDType>::Sum;
  static constexpr size_t kElements = kPieceBytes / sizeof(Stored);

  Sum values[kPiecesPerThread][kElements];

  __device__ __forceinline__ void round() {
#pragma unroll
    for (size_t i = 0; i < kPiecesPerThread; ++i) {
#pragma unroll
      for (size_t k = 0; k < kElements; ++k) {
        values[i][k] =
            Format<kDType>::widen(Format<kDType>::round(values[i][k]));
      }
    }
  }

  __device__ __forceinline__ void add(const Sums& term) {
#pragma unroll
    for (size_t i = 0; i < kPiecesPerThread; ++i) {
#pragma unroll
      for (size_t k = 0; k < kElements; ++k) {
        values[i][k] += term.values[i][k];
      }
    }
  }

  __device__ __forceinline__ void set(Sum value) {
#pragma unroll
    for (size_t i = 0; i < kPiecesPerThread; ++i) {
#pragma unroll
      for (size_t k = 0; k < kElements; ++k) {
        values[i][k] = value;
      }
    }
  }
};

template <size_t kUnit>
struct Pieces {
  PieceOf<kUnit> at[kPiecesPerThread];
};

template <DType kDType, size_t kUnit>
__device__ __forceinline__ Sums<kDType> scaled(
    const Pieces<kUnit>& pieces, typename Format<kDType>::Sum weight) {
  using Of = Sums<kDType>;
  Of sums;
#pragma unroll
  for (size_t i = 0; i < kPiecesPerThread; ++i) {
    typename Of::Stored stored[Of::kElements];
    memcpy(stored, &pieces.at[i], kPieceBytes);
#pragma unroll
    for (size_t k = 0; k < Of::kElements; ++k) {
      sums.values[i][k] = multiply(weight, Format<kDType>::widen(stored[k]));
    }
  }
  return sums;
}

/// A part of a row as one thread sees it.
struct Part {
  size_t begin;   // of its first piece, in bytes from the row's beginning
  size_t stride;  // to its next piece
};

/// Where a term lies.
struct Term {
  int32_t index;
  int32_t base;
};

template <size_t kUnit>
__device__ __forceinline__ Pieces<kUnit> loadTerm(
    const Reduce& call, const Part& part, Term term) {
  const bool isRow = term.index >= 0;
  const std::byte* const from =
      call.rows.rows.at[isRow ? term.base : 0] +
      (isRow ? static_cast<size_t>(term.index) : 0) * call.rowBytes;
  Pieces<kUnit> pieces;
#pragma unroll
  for (size_t i = 0; i < kPiecesPerThread; ++i) {
    const size_t at = part.begin + i * part.stride;
    pieces.at[i] = loadPiece<kUnit, true>(
        from + at, isRow ? bytesAt(at, call.rowBytes) : 0);
  }
  return pieces;
}

template <class Sum, size_t kUnit>
__device__ __forceinline__ Sum loadWeight(const ReduceRows& call, Term term) {
  Sum weight = 1;
  if (call.weighted && term.index >= 0) {
    const std::byte* const from = call.weights.at[term.base] +
                                  static_cast<size_t>(term.index) * sizeof(Sum);
    weight = kUnit == 1 ? loadAnywhere<Sum>(from) : load<Sum>(from);
  }
  return weight;
}

/// The sums over segments, fed with one term after the other. A sum begins with
/// its first term: that is what -0 plus the term gives, whatever it is.
template <DType kDType>
struct SegmentSums {
  Sums<kDType> segment;
  Sums<kDType> total;

  __device__ __forceinline__ SegmentSums() {
    segment.set(typename Sums<kDType>::Sum{-0.0F});
    total = segment;
  }
  __device__ __forceinline__ void endSegment() {
    segment.round();
    total.add(segment);
    segment.set(typename Sums<kDType>::Sum{-0.0F});
  }
};

/// Which segment a term belongs to, asked with ascending terms.
struct SegmentWalk {
  const int32_t* termEnd;
  int32_t segment;
  int32_t end;  // of the segment's terms

  __device__ __forceinline__ bool endsBefore(int32_t term) {
    if (term < end) {
      return false;
    }
    while (term >= end) {
      ++segment;
      end = termEnd[segment];
    }
    return true;
  }
};

template <DType kDType, size_t kUnit>
__device__ __forceinline__ void storeTotal(
    const Reduce& call,
    size_t row,
    const Part& part,
    const Sums<kDType>& sums) {
  using Of = Sums<kDType>;
  std::byte* const to = call.rows.to + row * call.rowBytes;
#pragma unroll
  for (size_t i = 0; i < kPiecesPerThread; ++i) {
    typename Of::Stored stored[Of::kElements];
#pragma unroll
    for (size_t k = 0; k < Of::kElements; ++k) {
      stored[k] = Format<kDType>::round(sums.values[i][k]);
    }
    PieceOf<kUnit> piece;
    memcpy(&piece, stored, kPieceBytes);
    const size_t at = part.begin + i * part.stride;
    storePiece(to + at, piece, bytesAt(at, call.rowBytes));
  }
}

template <DType kDType, size_t kUnit>
__device__ __forceinline__ void reducePart(
    const Reduce& call, size_t row, const Part& part) {
  using Sum = typename Format<kDType>::Sum;
  constexpr int32_t kAhead = kTermsAhead<kUnit>;
  const ReduceRows& rows = call.rows;
  int32_t first = static_cast<int32_t>(row);
  int32_t last = first + 1;
  if (rows.segmentBegin != nullptr) {
    first = rows.segmentBegin[row];
    last = rows.segmentBegin[row + 1];
  }
  const int32_t begin = rows.termBegin[first];
  const int32_t end = rows.termEnd[last - 1];
  SegmentSums<kDType> sums;
  SegmentWalk walk{rows.termEnd, first - 1, begin};
  for (int32_t t = begin; t < end; t += kAhead) {
    // Without a branch, so that no load waits for one of another term.
    Term terms[kAhead];
#pragma unroll
    for (int32_t i = 0; i < kAhead; ++i) {
      const bool isTerm = t + i < end;
      terms[i].index = isTerm ? rows.index[t + i] : -1;
      terms[i].base = isTerm && rows.base != nullptr ? rows.base[t + i] : 0;
    }
    Pieces<kUnit> pieces[kAhead];
    Sum weights[kAhead];
#pragma unroll
    for (int32_t i = 0; i < kAhead; ++i) {
      pieces[i] = loadTerm<kUnit>(call, part, terms[i]);
      weights[i] = loadWeight<Sum, kUnit>(rows, terms[i]);
    }
#pragma unroll
    for (int32_t i = 0; i < kAhead; ++i) {
      if (t + i < end) {
        if (walk.endsBefore(t + i)) {
          sums.endSegment();
        }
        sums.segment.add(scaled<kDType, kUnit>(pieces[i], weights[i]));
      }
    }
  }
  sums.endSegment();
  if (begin == end) {
    sums.total.set(0);
  }
  storeTotal<kDType, kUnit>(call, row, part, sums.total);
}

template <DType kDType, size_t kUnit>
__global__ void __launch_bounds__(kMostBlockThreads<kUnit>)
    reduceRows(const __grid_constant__ Reduce call) {
  const Team team = teamOf(call.teamShift);
  const size_t stride = kPieceBytes << call.teamShift;
  for (size_t item = team.item; item < call.rows.count * call.parts;
       item += team.step) {
    const size_t row = call.parts == 1 ? item : item / call.parts;
    const size_t part = item - row * call.parts;
    reducePart<kDType, kUnit>(
        call,
        row,
        {part * kPiecesPerThread * stride + team.rank * kPieceBytes, stride});
  }
}

Alignment alignmentOf(const Reduce& call) {
  Alignment alignment;
  alignment.add(call.rows.to);
  alignment.add(call.rowBytes);
  alignment.add(call.rows.rows);
  if (call.rows.weighted) {
    Alignment weights;
    weights.add(call.rows.weights);
    if (weights.unit() < sumBytes(call.rows.dtype)) {
      alignment.add(size_t{1});  // the single bytes go with any weights
    }
  }
  return alignment;
}

template <DType kDType>
void reduceRowsOf(const ReduceRows& rows, DeviceStream stream) {
  Reduce call{rows, rows.elements * elementBytes(kDType), 0, 0};
  if (rows.termEnd == nullptr) {
    call.rows.termEnd = rows.termBegin + 1;
  }
  const size_t pieces = piecesOf(call.rowBytes);
  call.teamShift = teamShiftFor(pieces, kPiecesPerThread);
  const size_t partPieces = kPiecesPerThread << call.teamShift;
  call.parts = (pieces + partPieces - 1) / partPieces;
  alignmentOf(call).withUnit<elementBytes(kDType)>([&](auto unit) {
    const unsigned threads = rows.maxBlocks > 0 ? kMostBlockThreads<unit> : 128;
    const unsigned blocks = blocksFor(
        rows.count * call.parts, threads >> call.teamShift, rows.maxBlocks);
    launch(
        "reduceRows",
        Kernel<reduceRows<kDType, unit>>(),
        {blocks, threads},
        stream,
        call);
  });
}

}  // namespace

void enqueue(const ReduceRows& call, DeviceStream stream) {
  if (call.termEnd != nullptr && call.segmentBegin != nullptr) {
    throw std::invalid_argument(
        "ReduceRows has both termEnd and segmentBegin, expected termEnd only "
        "where each row is one segment");
  }
  if (call.count == 0 || call.elements == 0) {
    return;
  }
  withDType(call.dtype, [&](auto dtype) {
    reduceRowsOf<decltype(dtype)::value>(call, stream);
  });
}

}  // namespace automoe::kernels
