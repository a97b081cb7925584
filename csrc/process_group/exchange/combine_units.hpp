// SPDX-License-Identifier: Apache-2.0
// In which order the rows of a combine are summed on a node, and how node-mates
// bring theirs. Pure.
#pragma once

#include <cstdint>
#include <vector>

#include "process_group/exchange/combine_arguments.hpp"
#include "process_group/exchange/route.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe {

/// Land rows [begin, end) of one source: what is summed, sent and taken
/// together, about as much as one message carries.
struct CombineUnit {
  int source;
  size_t begin;
  size_t end;
};

/// The units of a landing rank of this node, the same on all its ranks. A rank
/// of another node gets its sums from its rail peer here; a rank of this node
/// makes its own. One unit of each source in turn, those of this node last,
/// so that all links are busy from the start.
std::vector<CombineUnit> combineUnits(
    const Route& route,
    const CombineArguments& arguments,
    const Topology& topology,
    int landing);

/// Bytes that one unit takes from landing rank to source. A chunk holds the
/// rows (a sum per land row, or where the nodes send no sums the rows of all
/// entries), then for each entry its weight and the local rank that it comes
/// from (without sums only), then its scalar.
size_t combineChunkBytes(
    const Route& route,
    const CombineArguments& arguments,
    size_t landRows,
    size_t entries);

/// This rank's rows for a landing rank of its node: for each unit that it has
/// entries in, their rows, then their weights, then their scalars. An entry
/// that was dropped has zeros.
class RowStream {
 public:
  RowStream(
      const Route& route,
      const CombineArguments& arguments,
      std::vector<CombineUnit> units);

  uint64_t bytes() const { return bytes_; }
  size_t largestUnit() const { return largestUnit_; }
  /// Writes as many units as fit `room` (which the largest one does); returns
  /// their bytes and sets their number.
  size_t next(size_t room, std::byte* to, uint32_t& numUnits);

 private:
  size_t entriesIn(const CombineUnit& unit) const;
  void write(const CombineUnit& unit, size_t entries, std::byte* to) const;

  Route route_;
  CombineArguments arguments_;
  std::vector<CombineUnit> units_;
  std::vector<size_t> entries_;  // of this rank, by unit
  size_t entryBytes_;
  size_t at_ = 0;
  uint64_t bytes_ = 0;
  size_t largestUnit_ = 0;
};

}  // namespace automoe
