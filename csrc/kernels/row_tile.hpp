// SPDX-License-Identifier: Apache-2.0
// Tiles: neighbouring elements of one row that fit registers. For row_sums.hpp,
// which says what its includer defines.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/row_math.hpp"

// Inlined without exception: a call with vector registers as arguments has no
// one ABI over instruction sets, and tiles shall stay in registers.
#define AUTOMOE_ROW_FUNCTION AUTOMOE_TARGET [[gnu::always_inline]] inline

// Before loops over a tile: only with constant indices can its parts be
// registers, and large loop bodies are else left as loops.
#define AUTOMOE_UNROLL _Pragma("GCC unroll 16")

namespace automoe::kernels {

/// Lanes has kDType, its types Stored and Sum, a type Register, the numbers
/// kLanes (elements in a register) and kTileParts (registers in a tile of a
/// sum), and
///   Register spread(Sum);                    // the same in every lane
///   Register add(Register, Register), multiply(Register, Register);
///   Register load(const std::byte*);         // widens; any address
///   Register rounded(Register);              // to values of Stored; any NaN
///   void store(std::byte*, Register);        // rounds; any address
///   void storeSums(Sum*, Register);          // as they are
template <class Lanes, size_t kNumParts>
struct Tile {
  static constexpr size_t kParts = kNumParts;
  static constexpr size_t kElements = kParts * Lanes::kLanes;
  static constexpr size_t kBytes = kElements * sizeof(typename Lanes::Stored);

  typename Lanes::Register parts[kParts];
};

/// With kWhole, `bytes` is not looked at; without, only so many are read and
/// the rest of the tile is zero.
template <class Lanes, size_t kParts, bool kWhole>
AUTOMOE_ROW_FUNCTION Tile<Lanes, kParts> loadTile(
    const std::byte* from, size_t bytes) {
  using Loaded = Tile<Lanes, kParts>;
  Loaded tile;
  if constexpr (kWhole) {
    constexpr size_t kStep = Loaded::kBytes / kParts;
    AUTOMOE_UNROLL
    for (size_t i = 0; i < kParts; ++i) {
      tile.parts[i] = Lanes::load(from + i * kStep);
    }
    return tile;
  } else {
    alignas(64) std::byte padded[Loaded::kBytes] = {};
    std::memcpy(padded, from, bytes);
    return loadTile<Lanes, kParts, true>(padded, 0);
  }
}

template <class Lanes, size_t kParts, bool kWhole>
AUTOMOE_ROW_FUNCTION void storeTile(
    std::byte* to, const Tile<Lanes, kParts>& tile, size_t bytes) {
  if constexpr (kWhole) {
    constexpr size_t kStep = Tile<Lanes, kParts>::kBytes / kParts;
    AUTOMOE_UNROLL
    for (size_t i = 0; i < kParts; ++i) {
      Lanes::store(to + i * kStep, tile.parts[i]);
    }
  } else {
    alignas(64) std::byte padded[Tile<Lanes, kParts>::kBytes];
    storeTile<Lanes, kParts, true>(padded, tile, 0);
    std::memcpy(to, padded, bytes);
  }
}

template <class Lanes, size_t kParts>
AUTOMOE_ROW_FUNCTION void addTile(
    Tile<Lanes, kParts>& sum, const Tile<Lanes, kParts>& term) {
  AUTOMOE_UNROLL
  for (size_t i = 0; i < kParts; ++i) {
    sum.parts[i] = Lanes::add(sum.parts[i], term.parts[i]);
  }
}

template <class Lanes, size_t kParts>
AUTOMOE_ROW_FUNCTION void scaleTile(
    Tile<Lanes, kParts>& tile, typename Lanes::Sum weight) {
  const typename Lanes::Register spread = Lanes::spread(weight);
  AUTOMOE_UNROLL
  for (size_t i = 0; i < kParts; ++i) {
    tile.parts[i] = Lanes::multiply(tile.parts[i], spread);
  }
}

/// The i-th value of an array at any address.
template <class T>
AUTOMOE_ROW_FUNCTION T valueAt(const void* values, size_t i) {
  T value;
  std::memcpy(
      &value, static_cast<const std::byte*>(values) + i * sizeof(T), sizeof(T));
  return value;
}

}  // namespace automoe::kernels
