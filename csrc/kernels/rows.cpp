// SPDX-License-Identifier: Apache-2.0
#include "kernels/rows.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace automoe::kernels {
namespace {

/// A row's first bytes, where the processor's own prefetcher knows nothing yet.
constexpr size_t kPrefetchBytes = 512;
constexpr size_t kLineBytes = 64;

void prefetchRow(const std::byte* row, size_t rowBytes) {
  const size_t bytes = std::min(rowBytes, kPrefetchBytes);
  for (size_t at = 0; at < bytes; at += kLineBytes) {
    __builtin_prefetch(row + at);
  }
}

/// Calls move(kSize) with a size that the compiler knows where it is one of a
/// single value, such as a weight: a call of memcpy takes longer than those.
template <class Move>
void withRowBytes(size_t rowBytes, const Move& move) {
  switch (rowBytes) {
    case 0:
      return;
    case 4:
      return move(std::integral_constant<size_t, 4>{});
    case 8:
      return move(std::integral_constant<size_t, 8>{});
    default:
      return move(rowBytes);
  }
}

uint64_t mix(uint64_t hash, uint64_t word) {
  // An odd multiplier loses nothing; its upper bits carry what the shift then
  // brings to the lower ones.
  hash = (hash ^ word) * 0x9E3779B97F4A7C15U;
  return hash ^ (hash >> 32);
}

}  // namespace

void gatherRows(
    std::byte* to,
    const std::byte* from,
    std::span<const int32_t> index,
    size_t rowBytes) {
  withRowBytes(rowBytes, [&](auto bytes) {
    const auto rowAt = [&](size_t i) {
      return from + static_cast<size_t>(index[i]) * bytes;
    };
    for (size_t i = 0; i < index.size(); ++i) {
      if (i + 1 < index.size()) {
        prefetchRow(rowAt(i + 1), bytes);
      }
      std::memcpy(to + i * bytes, rowAt(i), bytes);
    }
  });
}

void scatterRows(
    std::byte* to,
    std::span<const int32_t> index,
    const std::byte* from,
    size_t rowBytes) {
  withRowBytes(rowBytes, [&](auto bytes) {
    for (size_t i = 0; i < index.size(); ++i) {
      std::memcpy(
          to + static_cast<size_t>(index[i]) * bytes, from + i * bytes, bytes);
    }
  });
}

bool sameRow(const std::byte* a, const std::byte* b, size_t rowBytes) {
  return rowBytes == 0 || std::memcmp(a, b, rowBytes) == 0;
}

uint64_t probeRow(const std::byte* row, size_t rowBytes) {
  constexpr size_t kWords = 8;
  constexpr size_t kWordBytes = sizeof(uint64_t);
  uint64_t hash = rowBytes;
  const size_t words =
      std::min(kWords, (rowBytes + kWordBytes - 1) / kWordBytes);
  for (size_t i = 0; i < words; ++i) {
    uint64_t word = 0;
    if (rowBytes < kWordBytes) {
      std::memcpy(&word, row, rowBytes);
    } else {
      // From the first word to the last; with one word there is only that.
      const size_t at =
          words == 1 ? 0 : i * (rowBytes - kWordBytes) / (words - 1);
      std::memcpy(&word, row + at, kWordBytes);
    }
    hash = mix(hash, word);
  }
  return hash;
}

void countIds(std::span<const int32_t> ids, std::span<int32_t> counts) {
  for (const int32_t id : ids) {
    // A negative id is a large one as unsigned.
    if (static_cast<uint32_t>(id) < counts.size()) {
      counts[static_cast<uint32_t>(id)] += 1;
    }
  }
}

}  // namespace automoe::kernels
