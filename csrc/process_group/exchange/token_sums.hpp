// SPDX-License-Identifier: Apache-2.0
// What the origin of tokens makes of the chunks that nodes send it. Pure.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "process_group/exchange/combine_units.hpp"

namespace automoe {

/// Sums each token's rows once those of all its nodes are there, from the first
/// token to the last, so that few chunks are kept at a time. Without sums per
/// node it makes the whole tree of the reduction map here.
class TokenSums {
 public:
  using Bytes = std::unique_ptr<std::byte[]>;

  TokenSums(const Route& route, const CombineArguments& arguments);

  /// The next send rows to `node`, from row `first` of that node on. Throws
  /// TransportError for rows or bytes that are not the next.
  void arrived(
      int node, uint64_t first, uint64_t rows, Bytes chunk, size_t bytes);
  /// Sums what can be summed.
  void advance();
  /// Every row of the output is there.
  bool done() const { return done_; }
  /// Rows of a node that are not here yet.
  uint64_t missing(int node) const;

 private:
  struct Chunk {
    size_t begin;  // send rows
    size_t end;
    Bytes bytes;
  };
  struct Arrivals {
    std::deque<Chunk> chunks;
    size_t next = 0;    // the send row that comes next
    size_t cursor = 0;  // the send row that is summed next
  };
  struct Term {
    int32_t label;
    int32_t rank;
    const std::byte* row;
    const std::byte* weight;
  };

  void takeScalars(const Chunk& chunk) const;
  void takePacked(const Chunk& chunk);
  bool sumToken(int64_t token);
  void addRow(int node, const Arrivals& from);
  void writeSums(std::byte* out);
  void writeTree(std::byte* out);

  Route route_;
  CombineArguments arguments_;
  std::vector<Arrivals> arrivals_;           // by node
  std::vector<std::vector<int>> nodeRanks_;  // by node
  int64_t token_ = 0;
  bool done_ = false;
  // Of one token.
  std::vector<const std::byte*> rows_;
  std::vector<Term> terms_;
  std::vector<std::byte> weights_;
  std::vector<uint32_t> ends_;
};

}  // namespace automoe
