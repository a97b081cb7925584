// SPDX-License-Identifier: Apache-2.0
// What a landing rank makes of its own rows and those of its node-mates. Pure.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "process_group/exchange/combine_units.hpp"

namespace automoe {

/// Goes through the units of this rank, one by one: one sum per land row over
/// its entries in their order, which is (rank, local expert) ascending.
class PartialSums {
 public:
  PartialSums(
      const Route& route,
      const CombineArguments& arguments,
      const Topology& topology);

  bool done() const { return at_ == units_.size(); }
  const CombineUnit& unit() const { return units_[at_]; }
  /// Bytes that the mate with that local rank brings for this unit.
  size_t bytesOf(int localRank) const;
  /// Bytes of this unit's chunk.
  size_t chunkBytes() const;
  /// Makes the chunk. mateRows is by local rank: bytesOf() bytes each.
  void make(std::span<const std::byte* const> mateRows, std::byte* chunk);
  void advance();

  /// All bytes of the chunks for a source.
  uint64_t bytesFor(int source) const;
  /// True when there is exactly one chunk for a source.
  bool isOneUnit(int source) const;

 private:
  struct Cursor {
    const std::byte* row = nullptr;
    const std::byte* weight = nullptr;
    const std::byte* scalar = nullptr;
  };

  void countEntries();
  void openCursors(std::span<const std::byte* const> mateRows);
  void addTerm(int32_t entry);
  void writeRow(std::byte*& to);

  Route route_;
  CombineArguments arguments_;
  const int localRank_;
  std::vector<CombineUnit> units_;
  size_t at_ = 0;
  std::vector<size_t> counts_;   // entries of the unit, by local rank
  std::vector<Cursor> cursors_;  // by local rank
  std::vector<std::byte> zeros_;
  // Of one land row.
  std::vector<const std::byte*> rows_;
  std::vector<std::byte> weights_;
  // Of the whole unit, behind its rows.
  std::vector<std::byte> tailWeights_;
  std::vector<uint32_t> tailRanks_;
  std::vector<std::byte> tailScalars_;
};

}  // namespace automoe
