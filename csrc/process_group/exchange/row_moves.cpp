// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/row_moves.hpp"

#include <algorithm>
#include <cstring>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

using Field = DispatchArguments::Field;

size_t sourceRow(
    const Route& route, const DispatchArguments& arguments, size_t sendRow) {
  return arguments.packed ? sendRow
                          : static_cast<size_t>(route.sendToken(sendRow));
}

void copyRow(const Field& field, const std::byte* from, int32_t receiveRow) {
  std::memcpy(
      field.to + static_cast<size_t>(receiveRow) * field.rowBytes,
      from,
      field.rowBytes);
}

void copyWeight(
    const DispatchArguments& arguments,
    const std::byte* from,
    int32_t receiveRow) {
  std::memcpy(
      arguments.receivedWeights +
          static_cast<size_t>(receiveRow) * arguments.weightBytes,
      from,
      arguments.weightBytes);
}

const std::byte* weightOfSlot(
    const DispatchArguments& arguments, int32_t slot) {
  return arguments.weights + static_cast<size_t>(slot) * arguments.weightBytes;
}

}  // namespace

uint16_t layoutOf(const DispatchArguments& arguments) {
  uint64_t hash = arguments.fields.size();
  for (const Field& field : arguments.fields) {
    hash = (hash ^ field.rowBytes) * 0x9e3779b97f4a7c15;
    hash = (hash ^ field.dtype) * 0x9e3779b97f4a7c15;
    const uint64_t number =
        field.number ? 1 + static_cast<uint64_t>(*field.number) : 0;
    hash = (hash ^ number) * 0x9e3779b97f4a7c15;
  }
  return static_cast<uint16_t>(hash >> 48);
}

uint64_t rowBytesOf(const DispatchArguments& arguments) {
  uint64_t bytes = 0;
  for (const Field& field : arguments.fields) {
    bytes += field.rowBytes;
  }
  return bytes;
}

uint64_t packedBytes(
    const Route& route,
    const DispatchArguments& arguments,
    size_t begin,
    size_t end) {
  return (end - begin) * rowBytesOf(arguments) +
         (route.sendSlotBegin(end) - route.sendSlotBegin(begin)) *
             arguments.weightBytes;
}

size_t rowsThatFit(
    const Route& route,
    const DispatchArguments& arguments,
    size_t begin,
    size_t end,
    uint64_t room) {
  const uint64_t rowBytes = rowBytesOf(arguments);
  size_t next = begin;
  uint64_t bytes = 0;
  while (next < end) {
    bytes += rowBytes + route.sendSlots(next).size() * arguments.weightBytes;
    if (bytes > room) {
      break;
    }
    next += 1;
  }
  return std::max(next, begin + 1);
}

void packRows(
    const Route& route,
    const DispatchArguments& arguments,
    size_t begin,
    size_t end,
    std::byte* to) {
  for (size_t row = begin; row < end; ++row) {
    const size_t from = sourceRow(route, arguments, row);
    for (const Field& field : arguments.fields) {
      std::memcpy(to, field.from + from * field.rowBytes, field.rowBytes);
      to += field.rowBytes;
    }
  }
  if (arguments.weightBytes == 0) {
    return;
  }
  for (size_t row = begin; row < end; ++row) {
    for (const int32_t slot : route.sendSlots(row)) {
      std::memcpy(to, weightOfSlot(arguments, slot), arguments.weightBytes);
      to += arguments.weightBytes;
    }
  }
}

void unpackRows(
    const Route& route,
    const DispatchArguments& arguments,
    size_t begin,
    size_t end,
    std::span<const std::byte> bytes) {
  const uint64_t rowBytes = rowBytesOf(arguments);
  const size_t firstEntry = route.entryBegin(begin);
  const uint64_t expected =
      (end - begin) * rowBytes +
      (route.entryBegin(end) - firstEntry) * arguments.weightBytes;
  if (bytes.size() != expected) {
    throw TransportError(concat(
        "a chunk of ",
        end - begin,
        " rows has ",
        bytes.size(),
        " bytes, expected ",
        expected));
  }
  const std::byte* rowAt = bytes.data();
  const std::byte* weightAt = bytes.data() + (end - begin) * rowBytes;
  for (size_t row = begin; row < end; ++row) {
    for (const int32_t entry : route.entries(row)) {
      if (entry >= 0) {
        const std::byte* from = rowAt;
        for (const Field& field : arguments.fields) {
          copyRow(field, from, entry);
          from += field.rowBytes;
        }
        if (arguments.weightBytes > 0) {
          copyWeight(arguments, weightAt, entry);
        }
      }
      weightAt += arguments.weightBytes;
    }
    rowAt += rowBytes;
  }
}

void moveOwnRows(const Route& route, const DispatchArguments& arguments) {
  const size_t firstSend = route.sendBegin(route.node());
  const size_t firstLand = route.landBegin(route.rank());
  const size_t count = route.landBegin(route.rank() + 1) - firstLand;
  for (size_t i = 0; i < count; ++i) {
    const size_t from = sourceRow(route, arguments, firstSend + i);
    const auto slots = route.sendSlots(firstSend + i);
    const auto entries = route.entries(firstLand + i);
    for (size_t j = 0; j < entries.size(); ++j) {
      if (entries[j] < 0) {
        continue;
      }
      for (const Field& field : arguments.fields) {
        copyRow(field, field.from + from * field.rowBytes, entries[j]);
      }
      if (arguments.weightBytes > 0) {
        copyWeight(arguments, weightOfSlot(arguments, slots[j]), entries[j]);
      }
    }
  }
}

void clearPadding(const DispatchArguments& arguments) {
  for (size_t row = 0; row < arguments.receiveIndex.size(); ++row) {
    if (arguments.receiveIndex[row] >= 0) {
      continue;
    }
    for (const Field& field : arguments.fields) {
      std::memset(field.to + row * field.rowBytes, 0, field.rowBytes);
    }
    if (arguments.weightBytes > 0) {
      std::memset(
          arguments.receivedWeights + row * arguments.weightBytes,
          0,
          arguments.weightBytes);
    }
  }
}

}  // namespace automoe
