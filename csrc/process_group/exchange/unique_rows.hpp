// SPDX-License-Identifier: Apache-2.0
// Rows that are bit-identical and bound for one node, each different one once.
// Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace automoe {

/// Shorter rows are not worth their list.
constexpr uint64_t kSmallestUniqueRow = 256;

/// The rows of one block for each rank of a node.
///
/// A chunk is numRows and numReferences (4 bytes each), numRows ends of the
/// references of each row (4 bytes each), the references (local rank and row of
/// its block, 4 bytes each), and the rows.
class UniqueRows {
 public:
  /// Nothing when the blocks hold fewer than 15 % of rows twice, as a sample
  /// says. A row counts as the same only when all its bytes are.
  static std::optional<UniqueRows> find(
      std::span<const std::span<const std::byte>> blocks, size_t rowBytes);

  size_t numRows() const { return rows_.size(); }
  size_t rowBytes() const { return rowBytes_; }
  /// Bytes of all chunks.
  uint64_t bytes() const { return bytes_; }
  size_t numChunks() const { return chunkEnds_.size(); }
  /// Bytes and rows of a chunk; about as much as one message carries.
  size_t chunkBytes(size_t chunk) const;
  uint32_t chunkRows(size_t chunk) const;
  void writeChunk(size_t chunk, std::byte* to) const;

  /// Copies the rows of a chunk that are for `localRank` into its block;
  /// returns their bytes. Throws TransportError for a chunk that makes no
  /// sense.
  static uint64_t take(
      std::span<const std::byte> chunk,
      size_t rowBytes,
      uint32_t localRank,
      std::span<std::byte> block);

 private:
  struct Reference {
    uint32_t localRank;
    uint32_t row;
  };

  size_t chunkBegin(size_t chunk) const {
    return chunk == 0 ? 0 : chunkEnds_[chunk - 1];
  }
  void collect(std::span<const std::span<const std::byte>> blocks);
  void cutChunks();

  size_t rowBytes_ = 0;
  std::vector<const std::byte*> rows_;
  std::vector<uint32_t> referenceBegins_;  // by row, and the end
  std::vector<Reference> references_;      // sorted by row
  std::vector<size_t> chunkEnds_;          // rows
  uint64_t bytes_ = 0;
};

}  // namespace automoe
