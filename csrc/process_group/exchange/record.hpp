// SPDX-License-Identifier: Apache-2.0
// The fixed-layout header of everything that travels between two ranks.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace automoe {

enum class RecordKind : uint8_t {
  kPosted = 1,         // "I have posted this operation, with these sizes"
  kPayload = 2,        // a chunk of a direct payload
  kStaged = 3,         // a chunk that lies in an extent of the source
  kReadDone = 4,       // "I have read your tensor; it is yours again"
  kReadConfirmed = 7,  // "and it was there while you read it"
  kFailed = 5,         // the group is over; the payload says why
  kLeaving = 6,        // "I use this group no more"
  kCast = 8,           // a chunk for every rank of a node
  kRefused = 9,        // "I will not post this one"; the payload says why
  // Of a message between two ranks, see messages.hpp.
  kMessage = 10,           // the message, or that there is one
  kMessageReady = 11,      // "it may come"
  kMessageChunk = 12,      // a part of it, over the network
  kMessageStaged = 13,     // a part of it, in an extent of the source
  kMessageRead = 14,       // as kReadDone
  kMessageConfirmed = 15,  // as kReadConfirmed
  kAsk = 17,               // "have you called this one?"
  kAnswer = 18,            // `rows`: 1 or 0
  kCredit = 16,  // "`bytes` of what rode to me have found their place"
};

/// Which collective a record belongs to.
enum class OperationKind : uint8_t {
  kAllToAll = 1,
  kPlan = 2,
  kDispatch = 3,
  kCombine = 4,
  kBarrier = 5,
  kBroadcast = 6,
  kGather = 7,
  kScatter = 8,
  kAllGather = 9,
  kReduce = 10,
  kAllReduce = 11,
  kReduceScatter = 12,
  kPair = 13,  // a send and its receive; not a collective
  kDeviceDispatch = 14,
  kDeviceCombine = 15,
  kDevicePlan = 16,
  kDeviceAllToAll = 17,
};

/// Whether a collective of that kind is a ScheduledCollective, whose records
/// are messages.
inline bool isScheduled(OperationKind kind) {
  return kind >= OperationKind::kBarrier && kind < OperationKind::kPair;
}

/// "all_to_all", "plan", ...; "?" for a number that is no kind.
const char* nameOf(OperationKind kind);

/// How the payload of a kPosted record travels.
enum class Carrier : uint8_t {
  kNone = 0,         // there is none
  kInline = 1,       // with the record
  kExtent = 2,       // in an extent of the owner's node memory
  kCrossMemory = 3,  // the destination reads the source's tensor
  kLater = 4,        // in kPayload or kStaged records, once matched
};

/// 104 bytes, little-endian. `group` is also the token against stray traffic
/// and old jobs: a hash of the group's name and a nonce of this incarnation.
/// What says "block" below is a row in a dispatch or combine. Of a message, the
/// fields say what its collective is, see MessageDescription.
struct Record {
  static constexpr uint32_t kMagic = 0x656f6d61;  // "amoe"
  static constexpr uint8_t kVersion = 2;

  uint32_t magic = kMagic;
  uint8_t version = kVersion;
  RecordKind kind = RecordKind::kPosted;
  Carrier carrier = Carrier::kNone;
  uint8_t dtype = 0;
  uint64_t group = 0;
  uint64_t sequence = 0;
  int32_t source = 0;         // group rank
  int32_t destination = 0;    // group rank
  int32_t owner = 0;          // of the extent
  uint32_t elementBytes = 1;  // of an element; dispatch: of a weight
  uint64_t sendBytes = 0;     // from source to destination, in all
  uint64_t receiveBytes = 0;  // what the source expects from the destination;
                              // dispatch, combine: bytes of a row
  uint64_t offset = 0;        // of this chunk in its block, or in the extent
  uint64_t bytes = 0;         // of this chunk
  uint64_t place = 0;         // offset of the extent, or address to read
  uint64_t failures = 0;      // SegmentHeader::failures of the source
  uint64_t plan = 0;          // fingerprint of the plan that is used
  uint32_t rows = 0;          // of this chunk, from row `offset` on; of a call
                              // on a device: graphUseOf()
  OperationKind operation = OperationKind::kAllToAll;
  uint8_t scalarBytes = 0;  // combine: of what rides beside a row
  uint16_t layout = 0;      // dispatch: a hash of its tensors' types and sizes
};
static_assert(sizeof(Record) == 104);

inline std::span<const std::byte> asBytes(const Record& record) {
  return std::as_bytes(std::span(&record, 1));
}

/// The record at the start of a message. Throws TransportError when it is
/// short or foreign.
Record parseRecord(std::span<const std::byte> message);

/// What one rank sends to all ranks of one other node, in one message to its
/// rail peer there: sizes for each local rank, and the blocks if they ride.
struct Packet {
  struct Sizes {
    uint64_t sendBytes;     // from the source to this rank
    uint64_t receiveBytes;  // what the source expects from it
  };
  std::vector<Sizes> sizes;                        // by local rank
  std::vector<std::span<const std::byte>> blocks;  // by local rank, or empty

  bool hasBlocks() const { return !blocks.empty(); }
};

/// The bytes of a packet: count, sizes, then the blocks.
std::string encodePacket(const Packet& packet);
/// A view on received bytes. Throws TransportError when they do not hold
/// exactly `numRanks` sizes and either no blocks or all of them.
Packet decodePacket(std::span<const std::byte> bytes, int numRanks);

}  // namespace automoe
