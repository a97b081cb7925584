// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/route_send.hpp"

#include <algorithm>

#include "process_group/common/error.hpp"
#include "process_group/exchange/route_experts.hpp"

namespace automoe {
namespace {

/// A slot that has an expert.
struct Slot {
  int32_t index;
  int32_t token;
  int32_t node;
  int32_t nodeExpert;
};

/// Finds where experts are.
class ExpertPlaces {
 public:
  ExpertPlaces(const Topology& topology, int64_t numExperts)
      : chunk_(static_cast<uint32_t>(
            expertsPerRank(numExperts, topology.size()))) {
    for (int rank = 0; rank < topology.size(); ++rank) {
      nodeOf_.push_back(topology.nodeOf(rank));
      // Only the last rank that has experts may have fewer than chunk_, so the
      // earlier ranks of its node have that many.
      firstOf_.push_back(
          static_cast<uint32_t>(topology.localRankOf(rank)) * chunk_);
    }
  }

  void find(uint32_t expert, Slot& slot) const {
    const uint32_t rank = expert / chunk_;
    slot.node = nodeOf_[rank];
    slot.nodeExpert =
        static_cast<int32_t>(firstOf_[rank] + (expert - rank * chunk_));
  }

 private:
  uint32_t chunk_;
  std::vector<int32_t> nodeOf_;
  std::vector<uint32_t> firstOf_;
};

/// Up to this many, an insertion sort is the fastest.
constexpr size_t kFewKeys = 32;

void sortKeys(std::span<uint64_t> keys) {
  if (keys.size() > kFewKeys) {
    std::ranges::sort(keys);
    return;
  }
  for (size_t i = 1; i < keys.size(); ++i) {
    const uint64_t key = keys[i];
    size_t at = i;
    for (; at > 0 && keys[at - 1] > key; --at) {
      keys[at] = keys[at - 1];
    }
    keys[at] = key;
  }
}

void checkIds(
    std::span<const int32_t> topkIds, size_t topK, int64_t numExperts) {
  for (size_t i = 0; i < topkIds.size(); ++i) {
    if (topkIds[i] < -1 || topkIds[i] >= numExperts) {
      throw InvalidArgument(concat(
          "plan: topk_ids[",
          i / topK,
          "][",
          i % topK,
          "] is ",
          topkIds[i],
          ", expected -1 (no expert) or 0 to ",
          numExperts - 1));
    }
  }
}

/// The slots that have an expert, by (token, expert, k).
std::vector<Slot> sortSlots(
    std::span<const int32_t> topkIds, size_t topK, const ExpertPlaces& places) {
  std::vector<Slot> slots;
  slots.reserve(topkIds.size());
  std::vector<uint64_t> keys(topK);
  for (size_t first = 0; first < topkIds.size(); first += topK) {
    size_t count = 0;
    for (size_t k = 0; k < topK; ++k) {
      const int32_t id = topkIds[first + k];
      keys[count] = static_cast<uint64_t>(id) << 32 | k;
      count += id >= 0 ? 1 : 0;
    }
    const auto used = std::span(keys).first(count);
    sortKeys(used);
    for (const uint64_t key : used) {
      Slot& slot = slots.emplace_back();
      slot.index = static_cast<int32_t>(first + (key & UINT32_MAX));
      slot.token = static_cast<int32_t>(first / topK);
      places.find(static_cast<uint32_t>(key >> 32), slot);
    }
  }
  return slots;
}

/// Where each node's rows and slots begin.
struct Begins {
  std::vector<int32_t> rows;
  std::vector<int32_t> slots;
};

// The slots of a token follow each other, so a row is new when the last slot of
// its node was of another token.
Begins countByNode(std::span<const Slot> slots, size_t numNodes) {
  Begins begins{
      std::vector<int32_t>(numNodes + 1, 0),
      std::vector<int32_t>(numNodes + 1, 0)};
  std::vector<int32_t> lastToken(numNodes, -1);
  for (const Slot& slot : slots) {
    const auto node = static_cast<size_t>(slot.node);
    begins.slots[node + 1] += 1;
    begins.rows[node + 1] += lastToken[node] != slot.token ? 1 : 0;
    lastToken[node] = slot.token;
  }
  for (size_t node = 0; node < numNodes; ++node) {
    begins.slots[node + 1] += begins.slots[node];
    begins.rows[node + 1] += begins.rows[node];
  }
  return begins;
}

}  // namespace

SendRows makeSendRows(
    const Topology& topology,
    std::span<const int32_t> topkIds,
    int64_t topK,
    int64_t numExperts) {
  checkIds(topkIds, static_cast<size_t>(topK), numExperts);
  const auto slots = sortSlots(
      topkIds, static_cast<size_t>(topK), ExpertPlaces(topology, numExperts));
  const auto numNodes = static_cast<size_t>(topology.numNodes());
  auto [nextRow, nextSlot] = countByNode(slots, numNodes);

  SendRows send;
  send.begin = nextRow;
  send.tokens.resize(static_cast<size_t>(nextRow.back()));
  send.slotBegin.resize(send.tokens.size() + 1);
  send.slotBegin.back() = nextSlot.back();
  send.slots.resize(slots.size());
  send.nodeExperts.resize(slots.size());
  std::vector<int32_t> lastToken(numNodes, -1);
  for (const Slot& slot : slots) {
    const auto node = static_cast<size_t>(slot.node);
    const auto at = static_cast<size_t>(nextSlot[node]++);
    if (lastToken[node] != slot.token) {
      lastToken[node] = slot.token;
      const auto row = static_cast<size_t>(nextRow[node]++);
      send.tokens[row] = slot.token;
      send.slotBegin[row] = static_cast<int32_t>(at);
    }
    send.slots[at] = slot.index;
    send.nodeExperts[at] = slot.nodeExpert;
  }
  return send;
}

}  // namespace automoe
