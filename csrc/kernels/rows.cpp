// SPDX-License-Identifier: Apache-2.0
#include "kernels/rows.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels/row_math.hpp"

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
  uint64_t hash = rowBytes;
  const size_t words = probeWords(rowBytes);
  for (size_t i = 0; i < words; ++i) {
    uint64_t word = 0;
    if (rowBytes < sizeof(word)) {
      std::memcpy(&word, row, rowBytes);
    } else {
      // Of a size that the compiler knows: no call.
      std::memcpy(&word, row + probeWordAt(rowBytes, words, i), sizeof(word));
    }
    hash = mixProbe(hash, word);
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
