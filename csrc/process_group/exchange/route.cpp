// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/route.hpp"

#include <algorithm>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw InvalidArgument(
      concat("route: ", parts..., "; expected the words that a plan made"));
}

void checkWithin(const char* name, int64_t got, int64_t least, int64_t most) {
  if (got < least || got > most) {
    refuse(name, " is ", got, ", not in ", least, " to ", most);
  }
}

uint32_t bits(int32_t word) {
  return static_cast<uint32_t>(word);
}

// The loops below gather what is wrong instead of stopping at it: so they are
// vectorised, and a route is made at every dispatch and combine.

/// True when `begin` goes from 0 to `end` in steps of least .. most.
bool stepsWithin(
    std::span<const int32_t> begin, size_t end, uint32_t least, uint32_t most) {
  uint32_t wrong = 0;
  for (size_t i = 0; i + 1 < begin.size(); ++i) {
    const uint32_t step = bits(begin[i + 1]) - bits(begin[i]);
    // Steps of up to 2^31 could lead out of the range and back.
    wrong |= static_cast<uint32_t>(begin[i + 1] < begin[i]) |
             static_cast<uint32_t>(step - least > most - least);
  }
  return wrong == 0 && begin.front() == 0 &&
         static_cast<size_t>(begin.back()) == end;
}

bool allBelow(std::span<const int32_t> values, uint32_t end) {
  uint32_t wrong = 0;
  for (const int32_t value : values) {
    wrong |= static_cast<uint32_t>(bits(value) >= end);
  }
  return wrong == 0;
}

bool ascending(std::span<const int32_t> values) {
  uint32_t wrong = 0;
  for (size_t i = 1; i < values.size(); ++i) {
    wrong |= static_cast<uint32_t>(values[i] <= values[i - 1]);
  }
  return wrong == 0;
}

}  // namespace

Route::Route(std::span<const int32_t> words) {
  if (words.size() < kRouteHeaderWords) {
    refuse("got ", words.size(), " words");
  }
  header_ = readRouteHeader(words);
  checkHeader(words.size());
  sections_ = sectionsOf(header_, words);
  checkRanks();
  checkSend();
  checkLand();
  checkOwnRows();
  sumsPerNode_ = std::ranges::equal(nodeOfRank(), reductionMap());
}

void Route::checkHeader(size_t numWords) const {
  if (header_.magic == RouteHeader::kOnDevice) {
    throw InvalidArgument(
        "route: a device has the lists of this plan, and they are found by the "
        "tensor that plan() has given, in the process and for the group that "
        "made it; pass that tensor on, not a copy");
  }
  if (header_.magic != RouteHeader::kMagic) {
    refuse(
        "the first word is ",
        header_.magic,
        ", that of this version is ",
        RouteHeader::kMagic);
  }
  constexpr int64_t kMost = kMaxRouteLength;
  checkWithin("size", header_.size, 1, kMost);
  checkWithin("rank", header_.rank, 0, header_.size - 1);
  checkWithin("numNodes", header_.numNodes, 1, header_.size);
  checkWithin("topK", header_.topK, 1, kMost);
  checkWithin("numTokens", header_.numTokens, 0, kMost / header_.topK);
  checkWithin("totalTokens", header_.totalTokens, header_.numTokens, INT64_MAX);
  checkWithin("numExperts", header_.numExperts, 1, kMost);
  checkWithin("align", header_.align, 1, kMost);
  checkWithin("numReceiveRows", header_.numReceiveRows, 0, kMost);
  checkWithin("numDropped", header_.numDropped, 0, kMost);
  checkWithin("numSendRows", header_.numSendRows, 0, kMost);
  checkWithin("numSlots", header_.numSlots, 0, kMost);
  checkWithin("numLandRows", header_.numLandRows, 0, kMost);
  checkWithin("numEntries", header_.numEntries, 0, kMost);
  if (numWords != numRouteWords(header_)) {
    refuse("got ", numWords, " words, not ", numRouteWords(header_));
  }
}

void Route::checkRanks() const {
  if (!allBelow(sections_.nodeOfRank, bits(header_.numNodes))) {
    refuse("a rank is on none of ", header_.numNodes, " nodes");
  }
  if (!allBelow(sections_.reductionMap, bits(header_.size))) {
    refuse("a label of the reduction map is not below ", header_.size);
  }
}

void Route::checkSend() const {
  const auto topK = static_cast<uint32_t>(header_.topK);
  if (!stepsWithin(sections_.sendBegin, numSendRows(), 0, INT32_MAX)) {
    refuse("the nodes do not divide the send rows");
  }
  if (!stepsWithin(sections_.slotBegin, sections_.slots.size(), 1, topK)) {
    refuse("the send rows do not divide the slots");
  }
  if (!allBelow(
          sections_.sendTokens, static_cast<uint32_t>(header_.numTokens))) {
    refuse("a send row is of none of ", header_.numTokens, " tokens");
  }
  for (int node = 0; node < numNodes(); ++node) {
    const size_t begin = sendBegin(node);
    const size_t count = sendBegin(node + 1) - begin;
    if (!ascending(sections_.sendTokens.subspan(begin, count))) {
      refuse("the send rows to node ", node, " are not sorted by token");
    }
  }
  uint32_t wrong = 0;
  for (size_t row = 0; row < numSendRows(); ++row) {
    const uint32_t first = bits(sendToken(row)) * topK;
    for (const int32_t slot : sendSlots(row)) {
      wrong |= static_cast<uint32_t>(bits(slot) - first >= topK);
    }
  }
  if (wrong != 0) {
    refuse("a slot does not belong to the token of its send row");
  }
}

void Route::checkLand() const {
  const auto topK = static_cast<uint32_t>(header_.topK);
  if (!stepsWithin(sections_.landBegin, numLandRows(), 0, INT32_MAX)) {
    refuse("the ranks do not divide the land rows");
  }
  if (!stepsWithin(sections_.entryBegin, sections_.entries.size(), 1, topK)) {
    refuse("the land rows do not divide the entries");
  }
  const auto nodes = nodeOfRank();
  const auto self = nodes.begin() + header_.rank;
  const auto localRank =
      static_cast<uint32_t>(std::count(nodes.begin(), self, *self));
  const auto localSize =
      static_cast<uint32_t>(std::count(nodes.begin(), nodes.end(), *self));
  const auto numRows = static_cast<uint32_t>(header_.numReceiveRows);
  uint32_t wrong = 0;
  for (const int32_t entry : sections_.entries) {
    // ~entry of a receive row is 2^31 and more, which is no local rank.
    const uint32_t mate = ~bits(entry);
    const auto isRow = static_cast<uint32_t>(bits(entry) < numRows);
    const auto isMate = static_cast<uint32_t>(mate < localSize) &
                        static_cast<uint32_t>(mate != localRank);
    wrong |= 1U ^ (isRow | isMate | static_cast<uint32_t>(entry == kDropped));
  }
  if (wrong != 0) {
    refuse(
        "an entry is neither one of ",
        numRows,
        " receive rows nor a node-mate of ",
        localSize);
  }
}

// Own rows go straight from the slots to the entries: they must be as many.
void Route::checkOwnRows() const {
  const size_t send = sendBegin(node());
  const size_t land = landBegin(rank());
  const size_t count = sendBegin(node() + 1) - send;
  const size_t firstSlot = sendSlotBegin(send);
  const size_t firstEntry = entryBegin(land);
  bool same = landBegin(rank() + 1) - land == count;
  for (size_t i = 1; same && i <= count; ++i) {
    same = sendSlotBegin(send + i) - firstSlot ==
           entryBegin(land + i) - firstEntry;
  }
  if (!same) {
    refuse("the rows of this rank to its own node are not those that land");
  }
}

size_t Route::sendBegin(int node) const {
  AUTOMOE_CHECK(
      node >= 0 && node <= numNodes(),
      "a route to ",
      numNodes(),
      " nodes was asked for node ",
      node);
  return at(sections_.sendBegin[at(node)]);
}

size_t Route::landBegin(int source) const {
  AUTOMOE_CHECK(
      source >= 0 && source <= size(),
      "a route of ",
      size(),
      " ranks was asked for rank ",
      source);
  return at(sections_.landBegin[at(source)]);
}

}  // namespace automoe
