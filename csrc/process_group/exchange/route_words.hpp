// SPDX-License-Identifier: Apache-2.0
// How a route lies in its words: a header, then sections without gaps.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

namespace automoe {

/// What a route or an index into one is at most: words have 32 bits.
inline constexpr int64_t kMaxRouteLength = std::numeric_limits<int32_t>::max();

/// The first words; a field of 64 bits takes two, the lower one first.
struct RouteHeader {
  /// "AMR" and the version of this layout.
  static constexpr int32_t kMagic = 0x414d5201;
  /// "AMD": this header is all that the host has, a device has the lists.
  static constexpr int32_t kOnDevice = 0x414d4401;

  int32_t magic = kMagic;
  int32_t rank = 0;
  int32_t size = 0;
  int32_t numNodes = 0;
  int64_t numTokens = 0;
  int64_t totalTokens = 0;
  int64_t topK = 0;
  int64_t numExperts = 0;
  int64_t align = 0;
  int64_t numReceiveRows = 0;
  int64_t numDropped = 0;
  uint64_t fingerprint = 0;
  // Lengths of the sections that are not given by size and numNodes.
  int64_t numSendRows = 0;
  int64_t numSlots = 0;
  int64_t numLandRows = 0;
  int64_t numEntries = 0;
};
static_assert(std::is_trivially_copyable_v<RouteHeader>);
static_assert(std::has_unique_object_representations_v<RouteHeader>);

inline constexpr size_t kRouteHeaderWords =
    sizeof(RouteHeader) / sizeof(int32_t);

/// From the first words, of which there are kRouteHeaderWords.
inline RouteHeader readRouteHeader(std::span<const int32_t> words) {
  std::array<int32_t, kRouteHeaderWords> first;
  std::copy_n(words.begin(), first.size(), first.begin());
  return std::bit_cast<RouteHeader>(first);
}

/// Whether a device has the lists, so that only a header is here.
inline bool isRouteOnDevice(std::span<const int32_t> words) {
  return words.size() >= kRouteHeaderWords &&
         readRouteHeader(words).magic == RouteHeader::kOnDevice;
}

inline void writeRouteHeader(
    const RouteHeader& header, std::span<int32_t> words) {
  const auto first =
      std::bit_cast<std::array<int32_t, kRouteHeaderWords>>(header);
  std::ranges::copy(first, words.begin());
}

/// The sections in the order in which they follow the header.
///
///     send rows by node    sendBegin -> sendTokens, slotBegin -> slots
///     land rows by source  landBegin -> entryBegin -> entries
template <typename Word>
struct RouteSections {
  std::span<Word> nodeOfRank;    // (size,)
  std::span<Word> reductionMap;  // (size,)
  std::span<Word> sendBegin;     // (numNodes + 1,)
  std::span<Word> sendTokens;    // (numSendRows,)
  std::span<Word> slotBegin;     // (numSendRows + 1,)
  std::span<Word> slots;         // (numSlots,)
  std::span<Word> landBegin;     // (size + 1,)
  std::span<Word> entryBegin;    // (numLandRows + 1,)
  std::span<Word> entries;       // (numEntries,)
};

/// Words of a route; every length in the header is in [0, kMaxRouteLength].
inline size_t numRouteWords(const RouteHeader& header) {
  return kRouteHeaderWords + static_cast<size_t>(
                                 3 * int64_t{header.size} + header.numNodes +
                                 2 * header.numSendRows + header.numSlots +
                                 header.numLandRows + header.numEntries + 4);
}

/// The sections of words of which there are numRouteWords(header).
template <typename Word>
RouteSections<Word> sectionsOf(
    const RouteHeader& header, std::span<Word> words) {
  size_t next = kRouteHeaderWords;
  const auto take = [&](int64_t length) {
    const auto section = words.subspan(next, static_cast<size_t>(length));
    next += section.size();
    return section;
  };
  // A braced list is evaluated from left to right.
  return RouteSections<Word>{
      take(header.size),
      take(header.size),
      take(header.numNodes + 1),
      take(header.numSendRows),
      take(header.numSendRows + 1),
      take(header.numSlots),
      take(header.size + 1),
      take(header.numLandRows + 1),
      take(header.numEntries)};
}

}  // namespace automoe
