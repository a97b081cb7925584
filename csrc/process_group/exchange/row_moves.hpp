// SPDX-License-Identifier: Apache-2.0
// Rows of a dispatch between tensors and the bytes that travel. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels/dtype.hpp"
#include "process_group/exchange/route.hpp"

namespace automoe {

/// Memory of a dispatch on one rank. It must stay until
/// OperationCallbacks::released.
struct DispatchArguments {
  /// One tensor of rows; several travel side by side.
  struct Field {
    const std::byte* from;  // T rows; S send rows when packed
    std::byte* to;          // R receive rows
    uint64_t rowBytes;
    uint8_t dtype = 0;
    /// What the elements are, if numbers that kernels know; else bytes.
    std::optional<kernels::DType> number = std::nullopt;
  };
  std::span<const int32_t> route;
  std::span<const int32_t> receiveIndex;  // (R,)
  std::vector<Field> fields;
  bool packed = false;
  uint32_t weightBytes = 0;              // of one; 0: there are none
  const std::byte* weights = nullptr;    // (T, K)
  std::byte* receivedWeights = nullptr;  // (R,)
  /// Of the first field; compared between ranks, and its name for that.
  uint8_t dtype = 0;
  const char* (*dtypeName)(uint8_t) = nullptr;
};

/// A hash of the fields' types and bytes of a row: how ranks find out that they
/// do not send the same.
uint16_t layoutOf(const DispatchArguments& arguments);

/// Bytes of a row, all fields together.
uint64_t rowBytesOf(const DispatchArguments& arguments);

/// Bytes of send rows [begin, end) on the wire: rows, then their weights.
uint64_t packedBytes(
    const Route& route,
    const DispatchArguments& arguments,
    size_t begin,
    size_t end);
/// The end of the send rows from `begin` on, before `end`, that fit `room`
/// bytes; at least one.
size_t rowsThatFit(
    const Route& route,
    const DispatchArguments& arguments,
    size_t begin,
    size_t end,
    uint64_t room);
void packRows(
    const Route& route,
    const DispatchArguments& arguments,
    size_t begin,
    size_t end,
    std::byte* to);

/// Copies land rows [begin, end) of one source to this rank's receive rows.
/// Throws TransportError when `bytes` is not what these rows take.
void unpackRows(
    const Route& route,
    const DispatchArguments& arguments,
    size_t begin,
    size_t end,
    std::span<const std::byte> bytes);
/// The same for this rank's own rows, straight from the tensors.
void moveOwnRows(const Route& route, const DispatchArguments& arguments);
/// Zeroes the receive rows that are padding.
void clearPadding(const DispatchArguments& arguments);

}  // namespace automoe
