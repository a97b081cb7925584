// SPDX-License-Identifier: Apache-2.0
// Pieces of rows: 16 bytes that one thread handles, moved by the widest loads
// that the addresses allow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda_language.cuh"
#include "kernels/row_math.hpp"

namespace automoe::kernels {

constexpr size_t kPieceBytes = 16;

/// What one load moves.
template <size_t kBytes>
struct UnitOf;
template <>
struct UnitOf<16> {
  using Type = uint4;
};
template <>
struct UnitOf<8> {
  using Type = uint2;
};
template <>
struct UnitOf<4> {
  using Type = unsigned;
};
template <>
struct UnitOf<2> {
  using Type = unsigned short;
};
template <>
struct UnitOf<1> {
  using Type = unsigned char;
};

template <size_t kUnit>
union alignas(kPieceBytes) PieceOf {
  static constexpr size_t kUnits = kPieceBytes / kUnit;

  typename UnitOf<kUnit>::Type units[kUnits];
  uint4 whole;
};

/// The first `bytes` of a piece, a multiple of kUnit or more than a piece; the
/// rest is zero.
template <size_t kUnit, bool kOnce>
__device__ __forceinline__ PieceOf<kUnit> loadPiece(
    const std::byte* from, size_t bytes) {
  PieceOf<kUnit> piece;
  piece.whole = uint4{0, 0, 0, 0};
#pragma unroll
  for (size_t i = 0; i < PieceOf<kUnit>::kUnits; ++i) {
    loadIf<kOnce>(piece.units[i], from + i * kUnit, i * kUnit < bytes);
  }
  return piece;
}

template <size_t kUnit>
__device__ __forceinline__ void storePiece(
    std::byte* to, const PieceOf<kUnit>& piece, size_t bytes) {
#pragma unroll
  for (size_t i = 0; i < PieceOf<kUnit>::kUnits; ++i) {
    if (i * kUnit < bytes) {
      storeOnce(to + i * kUnit, piece.units[i]);
    }
  }
}

/// Addresses and sizes that a kernel's loads have to fit.
class Alignment {
 public:
  void add(const void* address) {
    bits_ |= reinterpret_cast<uintptr_t>(address);
  }
  void add(const RowBases& bases) {
    for (const std::byte* base : bases.at) {
      add(base);
    }
  }
  void add(size_t bytes) { bits_ |= bytes; }

  /// The widest unit, in bytes.
  size_t unit() const {
    size_t unit = kPieceBytes;
    while (bits_ % unit != 0) {
      unit /= 2;
    }
    return unit;
  }

  /// Calls call(unit), the widest unit as a std::integral_constant; where it
  /// is below kLeast, such as an element, the unit is one byte.
  template <size_t kLeast, class Call>
  void withUnit(const Call& call) const {
    withUnitUpTo<kPieceBytes, kLeast>(call);
  }

 private:
  template <size_t kUnit, size_t kLeast, class Call>
  void withUnitUpTo(const Call& call) const {
    if constexpr (kUnit < kLeast || kUnit == 1) {
      call(std::integral_constant<size_t, 1>{});
    } else if (unit() == kUnit) {
      call(std::integral_constant<size_t, kUnit>{});
    } else {
      withUnitUpTo<kUnit / 2, kLeast>(call);
    }
  }

  uintptr_t bits_ = 0;
};

/// A value at any address.
template <class T>
__device__ __forceinline__ T loadAnywhere(const std::byte* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T) == 0) {
    return load<T>(from);
  }
  T value;
  auto* bytes = reinterpret_cast<std::byte*>(&value);
  for (size_t i = 0; i < sizeof(T); ++i) {
    bytes[i] = from[i];
  }
  return value;
}

/// What a row has left from byte `at` on.
__device__ __forceinline__ size_t bytesAt(size_t at, size_t rowBytes) {
  return at < rowBytes ? rowBytes - at : 0;
}

/// 1, 2, 4 ... 32 neighbouring threads that share an item: so many are the
/// team's items from one to the next, and which thread of it this is.
struct Team {
  size_t item;  // the first
  size_t step;
  unsigned rank;
};

__device__ __forceinline__ Team teamOf(unsigned teamShift) {
  const size_t thread =
      static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const size_t threads = static_cast<size_t>(gridDim.x) * blockDim.x;
  return {
      thread >> teamShift,
      threads >> teamShift,
      threadIdx.x & ((1U << teamShift) - 1)};
}

/// For the fewest threads that hold so many pieces at once, at most a warp: the
/// logarithm of their number.
inline unsigned teamShiftFor(size_t pieces, size_t piecesPerThread) {
  unsigned shift = 0;
  while (shift < 5 && (piecesPerThread << shift) < pieces) {
    ++shift;
  }
  return shift;
}

/// How many pieces of 16 bytes hold a row.
inline size_t piecesOf(size_t rowBytes) {
  return (rowBytes + kPieceBytes - 1) / kPieceBytes;
}

/// With few blocks each has to keep as much memory in flight as it can.
inline unsigned blockThreadsFor(int maxBlocks) {
  return maxBlocks > 0 ? 1024 : 256;
}

}  // namespace automoe::kernels
