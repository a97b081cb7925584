// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/relay.hpp"

#include <cstring>
#include <optional>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

// Above this, a mate copies its part from node memory instead of getting it
// through its mailbox.
constexpr uint64_t kInlinePart = 2 * 1024;

bool byExtent(const Packet& packet, size_t local) {
  return packet.hasBlocks() && packet.blocks[local].size() > kInlinePart;
}

}  // namespace

void relayPacket(
    const Record& record,
    const Packet& packet,
    const Topology& topology,
    const std::vector<Mate*>& mates,
    NodeMemory& memory) {
  size_t extentBytes = 0;
  uint32_t readers = 0;
  for (size_t local = 0; local < mates.size(); ++local) {
    if (mates[local] != nullptr && byExtent(packet, local)) {
      extentBytes += packet.blocks[local].size();
      readers += 1;
    }
  }
  std::optional<NodeMemory::Extent> extent;
  if (readers > 0) {
    extent = memory.allocate(extentBytes, readers);
    AUTOMOE_CHECK(extent.has_value(), "node memory is full");
  }
  const auto ranks = topology.ranksOf(topology.node());
  size_t position = 0;
  for (size_t local = 0; local < mates.size(); ++local) {
    if (mates[local] == nullptr) {
      continue;
    }
    Record part = record;
    part.destination = ranks[local];
    part.sendBytes = packet.sizes[local].sendBytes;
    part.receiveBytes = packet.sizes[local].receiveBytes;
    std::span<const std::byte> payload;
    if (part.sendBytes == 0) {
      part.carrier = Carrier::kNone;
    } else if (!packet.hasBlocks()) {
      part.carrier = Carrier::kLater;
    } else if (!byExtent(packet, local)) {
      part.carrier = Carrier::kInline;
      payload = packet.blocks[local];
    } else {
      const auto& block = packet.blocks[local];
      part.carrier = Carrier::kExtent;
      part.owner = topology.rank();
      part.place = extent->offset;
      part.offset = position;
      std::memcpy(extent->data + position, block.data(), block.size());
      position += block.size();
    }
    part.bytes = payload.size();
    mates[local]->post(asBytes(part), payload);
  }
}

void relayCast(
    const Record& record,
    std::span<const std::byte> payload,
    int ownRank,
    const std::vector<Mate*>& mates,
    NodeMemory& memory) {
  Record part = record;
  if (payload.size() > kInlinePart && !mates.empty()) {
    const auto extent =
        memory.allocate(payload.size(), static_cast<uint32_t>(mates.size()));
    AUTOMOE_CHECK(extent.has_value(), "node memory is full");
    std::memcpy(extent->data, payload.data(), payload.size());
    part.carrier = Carrier::kExtent;
    part.owner = ownRank;
    part.place = extent->offset;
    payload = {};
  }
  for (Mate* mate : mates) {
    mate->post(asBytes(part), payload);
  }
}

}  // namespace automoe
