// SPDX-License-Identifier: Apache-2.0
// Rows that a dispatch on a device sends to other nodes as 8-bit floats.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <vector>

#include "process_group/exchange/device_moves.hpp"
#include "process_group/exchange/device_wire.hpp"

namespace automoe {

/// The fields of a dispatch that cross between nodes that way, in scratch
/// memory: values and scales of the send rows on one side, of the land rows on
/// the other. A column is the field of that number; what begins and ends are
/// rows of all.
class Fp8Columns {
 public:
  Fp8Columns(
      const DeviceLane& lane,
      const DispatchArguments& arguments,
      size_t sendRows,
      size_t landRows);

  bool has(size_t column) const {
    return column < formats_.size() && formats_[column].has_value();
  }
  /// Bytes of scratch memory that place() is given.
  size_t sendBytes() const { return outgoing_.bytes(); }
  size_t landBytes() const { return incoming_.bytes(); }
  void place(std::byte* outgoing, std::byte* incoming);

  /// Enqueues: send row i is row index[i] of `rows`, or without an index i.
  void quantize(
      size_t column,
      const std::byte* rows,
      const int32_t* index,
      size_t begin,
      size_t end) const;
  /// Enqueues: land row i goes to row i of `rows`.
  void dequantize(
      size_t column, std::byte* rows, size_t begin, size_t end) const;

  /// What the network carries instead of the column: values and scales, from
  /// those of the send rows to those of the land rows.
  std::array<DeviceColumn, 2> carried(size_t column) const;

 private:
  /// QuantizeRows or DequantizeRows of rows [begin, end) of a column, whose
  /// values and scales lie in `memory`.
  template <typename Call>
  Call callFor(
      std::byte* memory,
      const ColumnLayout& layout,
      size_t column,
      size_t begin,
      size_t end) const;
  template <typename Call>
  void run(const Call& call) const;

  const DeviceLane& lane_;
  const std::vector<std::optional<Fp8Format>> formats_;  // by field
  // Of each field two: its values and its scales.
  const ColumnLayout outgoing_;
  const ColumnLayout incoming_;
  std::byte* send_ = nullptr;
  std::byte* land_ = nullptr;
};

}  // namespace automoe
