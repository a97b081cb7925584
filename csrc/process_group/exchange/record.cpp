// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/record.hpp"

#include <cstring>

#include "process_group/common/bytes.hpp"
#include "process_group/common/error.hpp"

namespace automoe {

const char* nameOf(OperationKind kind) {
  switch (kind) {
    case OperationKind::kAllToAll:
      return "all_to_all";
    case OperationKind::kPlan:
      return "plan";
    case OperationKind::kDispatch:
      return "dispatch";
    case OperationKind::kCombine:
      return "combine";
    case OperationKind::kBarrier:
      return "barrier";
    case OperationKind::kBroadcast:
      return "broadcast";
    case OperationKind::kGather:
      return "gather";
    case OperationKind::kScatter:
      return "scatter";
    case OperationKind::kAllGather:
      return "all_gather";
    case OperationKind::kReduce:
      return "reduce";
    case OperationKind::kAllReduce:
      return "all_reduce";
    case OperationKind::kReduceScatter:
      return "reduce_scatter";
    case OperationKind::kPair:
      return "send";
    case OperationKind::kDeviceDispatch:
      return "dispatch on a device";
    case OperationKind::kDeviceCombine:
      return "combine on a device";
    case OperationKind::kDevicePlan:
      return "plan on a device";
    case OperationKind::kDeviceAllToAll:
      return "all_to_all on a device";
  }
  return "?";
}

Record parseRecord(std::span<const std::byte> message) {
  Record record;
  if (message.size() < sizeof(Record)) {
    throw TransportError(
        concat("a record of ", message.size(), " bytes is too short"));
  }
  std::memcpy(&record, message.data(), sizeof(Record));
  if (record.magic != Record::kMagic || record.version != Record::kVersion) {
    throw TransportError(concat(
        "a foreign record (version ",
        int{record.version},
        ", ours is ",
        int{Record::kVersion},
        ")"));
  }
  return record;
}

std::string encodePacket(const Packet& packet) {
  size_t total = sizeof(uint64_t) + packet.sizes.size() * sizeof(Packet::Sizes);
  for (const auto& block : packet.blocks) {
    total += block.size();
  }
  std::string bytes;
  bytes.reserve(total);
  const uint64_t count = packet.sizes.size();
  bytes.append(reinterpret_cast<const char*>(&count), sizeof(count));
  bytes.append(
      reinterpret_cast<const char*>(packet.sizes.data()),
      packet.sizes.size() * sizeof(Packet::Sizes));
  for (const auto& block : packet.blocks) {
    bytes.append(reinterpret_cast<const char*>(block.data()), block.size());
  }
  return bytes;
}

Packet decodePacket(std::span<const std::byte> bytes, int numRanks) {
  ByteReader reader(bytes.data(), bytes.size());
  const auto count = reader.get<uint64_t>();
  if (count != static_cast<uint64_t>(numRanks)) {
    throw TransportError(concat(
        "a packet for ", count, " ranks arrived at a node of ", numRanks));
  }
  Packet packet;
  for (uint64_t i = 0; i < count; ++i) {
    packet.sizes.push_back(reader.get<Packet::Sizes>());
  }
  if (reader.remaining() == 0) {
    return packet;
  }
  for (const Packet::Sizes& it : packet.sizes) {
    const char* block = reader.take(it.sendBytes);
    packet.blocks.push_back(std::as_bytes(std::span(block, it.sendBytes)));
  }
  if (reader.remaining() != 0) {
    throw TransportError(concat(
        "a packet has ", reader.remaining(), " bytes more than it says"));
  }
  return packet;
}

}  // namespace automoe
