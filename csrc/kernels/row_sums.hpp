// SPDX-License-Identifier: Apache-2.0
// The order of sums, over tiles of neighbouring elements that fit registers.
// Whoever includes this first defines AUTOMOE_TARGET (what the code is compiled
// for) and then, in an unnamed namespace, Lanes<DType>: one register. Its name
// is one of its own (Avx2Lanes): GCC gives a template with a template of an
// unnamed namespace as its argument external linkage, and the linker would take
// one variant for all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/reduce_variant.hpp"
#include "kernels/row_tile.hpp"

namespace automoe::kernels {

/// A piece of all rows: `offset` bytes from their beginning.
struct Piece {
  size_t offset;
  size_t bytes;
};

template <class Lanes, size_t kParts, bool kWhole, bool kWeighted>
AUTOMOE_ROW_FUNCTION auto term(const Terms& terms, Piece piece, size_t i) {
  auto tile = loadTile<Lanes, kParts, kWhole>(
      terms.rows[i] + piece.offset, piece.bytes);
  if constexpr (kWeighted) {
    scaleTile(tile, valueAt<typename Lanes::Sum>(terms.weights, i));
  }
  return tile;
}

/// Terms begin..end-1, from left to right.
template <class Lanes, size_t kParts, bool kWhole, bool kWeighted>
AUTOMOE_ROW_FUNCTION auto sumOfTerms(
    const Terms& terms, Piece piece, size_t begin, size_t end) {
  auto sum = term<Lanes, kParts, kWhole, kWeighted>(terms, piece, begin);
  for (size_t i = begin + 1; i < end; ++i) {
    addTile(sum, term<Lanes, kParts, kWhole, kWeighted>(terms, piece, i));
  }
  return sum;
}

/// The rounded sums of all segments, from left to right.
template <class Lanes, size_t kParts, bool kWhole, bool kWeighted>
AUTOMOE_ROW_FUNCTION auto sumOfSegments(const Terms& terms, Piece piece) {
  Tile<Lanes, kParts> total;
  size_t begin = 0;
  for (size_t s = 0; s < terms.numSegments; ++s) {
    const size_t end = terms.segmentEnds[s];
    if (begin == end) {
      continue;
    }
    auto sum =
        sumOfTerms<Lanes, kParts, kWhole, kWeighted>(terms, piece, begin, end);
    AUTOMOE_UNROLL
    for (auto& part : sum.parts) {
      part = Lanes::rounded(part);
    }
    if (begin == 0) {
      total = sum;
    } else {
      addTile(total, sum);
    }
    begin = end;
  }
  return total;
}

template <
    class Lanes,
    size_t kParts,
    bool kWhole,
    bool kWeighted,
    bool kSegments>
AUTOMOE_ROW_FUNCTION void reducePiece(
    std::byte* out, const Terms& terms, Piece piece) {
  Tile<Lanes, kParts> sum;
  if constexpr (kSegments) {
    sum = sumOfSegments<Lanes, kParts, kWhole, kWeighted>(terms, piece);
  } else {
    sum = sumOfTerms<Lanes, kParts, kWhole, kWeighted>(
        terms, piece, 0, terms.numRows);
  }
  storeTile<Lanes, kParts, kWhole>(out + piece.offset, sum, piece.bytes);
}

template <class Lanes, bool kWeighted, bool kSegments>
AUTOMOE_TARGET void reduceRowOf(
    std::byte* out, const Terms& terms, size_t elements) {
  // With segments there are two sums at a time.
  constexpr size_t kParts = Lanes::kTileParts / (kSegments ? 2 : 1);
  constexpr size_t kStep = Tile<Lanes, kParts>::kBytes;
  const size_t bytes = elements * sizeof(typename Lanes::Stored);
  size_t at = 0;
  for (; bytes - at >= kStep; at += kStep) {
    reducePiece<Lanes, kParts, true, kWeighted, kSegments>(
        out, terms, {at, kStep});
  }
  if (at < bytes) {
    reducePiece<Lanes, kParts, false, kWeighted, kSegments>(
        out, terms, {at, bytes - at});
  }
}

template <class Lanes>
AUTOMOE_TARGET void reduceRowOf(
    std::byte* out, const Terms& terms, size_t elements) {
  if (terms.weights == nullptr) {
    terms.numSegments == 0
        ? reduceRowOf<Lanes, false, false>(out, terms, elements)
        : reduceRowOf<Lanes, false, true>(out, terms, elements);
  } else {
    terms.numSegments == 0
        ? reduceRowOf<Lanes, true, false>(out, terms, elements)
        : reduceRowOf<Lanes, true, true>(out, terms, elements);
  }
}

/// See kDotLanes.
template <class Lanes, size_t kParts>
AUTOMOE_ROW_FUNCTION typename Lanes::Sum sumOfLanes(Tile<Lanes, kParts> tile) {
  for (size_t n = kParts / 2; n > 0; n /= 2) {
    AUTOMOE_UNROLL
    for (size_t i = 0; i < n; ++i) {
      tile.parts[i] = Lanes::add(tile.parts[i], tile.parts[i + n]);
    }
  }
  alignas(64) typename Lanes::Sum sums[Lanes::kLanes];
  Lanes::storeSums(sums, tile.parts[0]);
  for (size_t n = Lanes::kLanes / 2; n > 0; n /= 2) {
    AUTOMOE_UNROLL
    for (size_t i = 0; i < n; ++i) {
      sums[i] += sums[i + n];
    }
  }
  return sums[0];
}

/// Adds the products of one piece to the lanes and scales the gradients.
template <class Lanes, size_t kParts, bool kWhole, bool kScale, bool kDot>
AUTOMOE_ROW_FUNCTION void scaleAndDotPiece(
    std::byte* grads,
    const std::byte* values,
    typename Lanes::Sum weight,
    Tile<Lanes, kParts>& lanes,
    size_t bytes) {
  auto tile = loadTile<Lanes, kParts, kWhole>(grads, bytes);
  if constexpr (kDot) {
    const auto other = loadTile<Lanes, kParts, kWhole>(values, bytes);
    AUTOMOE_UNROLL
    for (size_t i = 0; i < kParts; ++i) {
      lanes.parts[i] = Lanes::add(
          lanes.parts[i], Lanes::multiply(tile.parts[i], other.parts[i]));
    }
  }
  if constexpr (kScale) {
    scaleTile(tile, weight);
    storeTile<Lanes, kParts, kWhole>(grads, tile, bytes);
  }
}

template <class Lanes, size_t kParts, bool kScale, bool kDot>
AUTOMOE_ROW_FUNCTION typename Lanes::Sum scaleAndDotRow(
    std::byte* grads,
    const std::byte* values,
    typename Lanes::Sum weight,
    size_t bytes) {
  constexpr size_t kStep = Tile<Lanes, kParts>::kBytes;
  Tile<Lanes, kParts> lanes;
  AUTOMOE_UNROLL
  for (auto& part : lanes.parts) {
    part = Lanes::spread(0);
  }
  size_t at = 0;
  for (; bytes - at >= kStep; at += kStep) {
    scaleAndDotPiece<Lanes, kParts, true, kScale, kDot>(
        grads + at, values + at, weight, lanes, kStep);
  }
  if (at < bytes) {
    scaleAndDotPiece<Lanes, kParts, false, kScale, kDot>(
        grads + at, values + at, weight, lanes, bytes - at);
  }
  return sumOfLanes(lanes);
}

template <class Lanes, bool kScale, bool kDot>
AUTOMOE_TARGET void scaleAndDotRowsOf(
    std::byte* grads,
    const std::byte* values,
    const void* weights,
    void* dots,
    size_t count,
    size_t elements) {
  using Sum = typename Lanes::Sum;
  using Stored = typename Lanes::Stored;
  constexpr size_t kParts = kDotLanes<Lanes::kDType> / Lanes::kLanes;
  const size_t bytes = elements * sizeof(Stored);
  for (size_t row = 0; row < count; ++row) {
    const Sum weight = kScale ? valueAt<Sum>(weights, row) : Sum{1};
    const Sum dot = scaleAndDotRow<Lanes, kParts, kScale, kDot>(
        grads + row * bytes, values + row * bytes, weight, bytes);
    if constexpr (kDot) {
      const Sum written = withOneNaN(dot);
      std::memcpy(
          static_cast<std::byte*>(dots) + row * sizeof(Sum),
          &written,
          sizeof(Sum));
    }
  }
}

template <class Lanes>
void scaleAndDotRowsOf(
    std::byte* grads,
    const std::byte* values,
    const void* weights,
    void* dots,
    size_t count,
    size_t elements) {
  auto run = scaleAndDotRowsOf<Lanes, true, true>;
  if (weights == nullptr) {
    run = scaleAndDotRowsOf<Lanes, false, true>;
  } else if (dots == nullptr) {
    run = scaleAndDotRowsOf<Lanes, true, false>;
  }
  run(grads, values, weights, dots, count, elements);
}

/// Calls call(Lanes<kDType>{}) for a type known at run time.
template <template <DType> class Lanes, class Call>
void withLanes(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat64:
      return call(Lanes<DType::kFloat64>{});
    case DType::kFloat32:
      return call(Lanes<DType::kFloat32>{});
    case DType::kBFloat16:
      return call(Lanes<DType::kBFloat16>{});
    case DType::kFloat16:
      return call(Lanes<DType::kFloat16>{});
  }
}

template <template <DType> class Lanes>
void reduceRowWith(
    DType dtype, std::byte* out, const Terms& terms, size_t elements) {
  withLanes<Lanes>(dtype, [&](auto lanes) {
    reduceRowOf<decltype(lanes)>(out, terms, elements);
  });
}

template <template <DType> class Lanes>
void scaleAndDotRowsWith(
    DType dtype,
    std::byte* grads,
    const std::byte* values,
    const void* weights,
    void* dots,
    size_t count,
    size_t elements) {
  withLanes<Lanes>(dtype, [&](auto lanes) {
    scaleAndDotRowsOf<decltype(lanes)>(
        grads, values, weights, dots, count, elements);
  });
}

}  // namespace automoe::kernels
