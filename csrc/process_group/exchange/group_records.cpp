// SPDX-License-Identifier: Apache-2.0
// What arrives for a group.
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/combine.hpp"
#include "process_group/exchange/device_call.hpp"
#include "process_group/exchange/dispatch.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"
#include "process_group/exchange/plan_exchange.hpp"
#include "process_group/exchange/relay.hpp"
#include "process_group/exchange/scheduled.hpp"

namespace automoe {

std::shared_ptr<Collective> Group::make(
    uint64_t sequence, OperationKind kind, int rank) {
  std::shared_ptr<Collective> made;
  switch (kind) {
    case OperationKind::kAllToAll:
      made = std::make_shared<AllToAll>(*this, sequence);
      break;
    case OperationKind::kPlan:
      made = std::make_shared<PlanExchange>(*this, sequence);
      break;
    case OperationKind::kDispatch:
      made = std::make_shared<Dispatch>(*this, sequence);
      break;
    case OperationKind::kCombine:
      made = std::make_shared<Combine>(*this, sequence);
      break;
    case OperationKind::kDeviceDispatch:
    case OperationKind::kDeviceCombine:
    case OperationKind::kDevicePlan:
    case OperationKind::kDeviceAllToAll:
      made = std::make_shared<DeviceCall>(*this, sequence, kind);
      break;
    case OperationKind::kBarrier:
    case OperationKind::kBroadcast:
    case OperationKind::kGather:
    case OperationKind::kScatter:
    case OperationKind::kAllGather:
    case OperationKind::kReduce:
    case OperationKind::kAllReduce:
    case OperationKind::kReduceScatter:
      made = std::make_shared<ScheduledCollective>(*this, sequence, kind);
      break;
    default:
      throw TransportError(concat(
          "a record of rank ",
          rank,
          " is for an operation of kind ",
          static_cast<int>(kind)));
  }
  made->setFirstRank(rank);
  return made;
}

std::shared_ptr<Collective> Group::operation(
    uint64_t sequence, OperationKind kind, int rank) {
  const auto it = operations_.find(sequence);
  if (it == operations_.end()) {
    const auto made = make(sequence, kind, rank);
    operations_.emplace(sequence, made);
    return made;
  }
  if (it->second->operationKind() == kind) {
    return it->second;
  }
  failKinds(
      sequence,
      {it->second->firstRank(), it->second->operationKind()},
      {rank, kind});
  return nullptr;
}

void Group::failKinds(uint64_t sequence, Call low, Call high) {
  // The lower rank first, so that every rank says the same.
  if (high.rank < low.rank) {
    std::swap(low, high);
  }
  fail(
      FailureKind::kMismatch,
      concat(
          "operation number ",
          sequence,
          " of group ",
          name(),
          " is ",
          nameOf(low.kind),
          " on rank ",
          low.rank,
          ", but ",
          nameOf(high.kind),
          " on rank ",
          high.rank,
          "; all ranks must call the same collectives in the same order"));
}

void Group::failMismatch(const std::string& title, const std::string& text) {
  fail(
      FailureKind::kMismatch,
      concat(
          title,
          " of group ",
          name(),
          ": ",
          text.empty() ? "a message that no step waits for" : text));
}

void Group::operationEnded(uint64_t sequence) {
  inquiries_.erase(sequence);
  operations_.erase(sequence);
}

void Group::handle(
    const Record& record,
    std::span<const std::byte> payload,
    const Mate* fromMate) {
  const auto inGroup = [&](int rank) {
    return rank >= 0 && rank < topology().size();
  };
  if (!inGroup(record.source) || record.source == topology().rank() ||
      !inGroup(record.owner)) {
    throw TransportError(
        concat("a record of rank ", record.source, " came to group ", name()));
  }
  const bool byNetwork = fromMate == nullptr;
  if (record.kind == RecordKind::kLeaving) {
    handleLeaving(record, byNetwork);
    return;
  }
  if (record.kind == RecordKind::kFailed) {
    handleFailed(record, payload, byNetwork);
    return;
  }
  if (failed()) {
    releaseUnread(record, byNetwork);
    return;
  }
  if (handleMessage(record, payload)) {
    return;
  }
  if (refused_.contains(record.sequence)) {
    releaseUnread(record, byNetwork);
    return;
  }
  if (record.kind == RecordKind::kRefused) {
    handleRefused(record, payload, byNetwork);
    return;
  }
  if (record.sequence < nextSequence_ &&
      operations_.find(record.sequence) == operations_.end()) {
    handleLate(record, payload, byNetwork);
    return;
  }
  handleCollective(record, payload, byNetwork);
}

bool Group::handleMessage(
    const Record& record, std::span<const std::byte> payload) {
  if (record.kind < RecordKind::kMessage) {
    return false;
  }
  if (record.operation == OperationKind::kPair) {
    if (record.kind == RecordKind::kMessage) {
      pairs_.arrived(record, payload);
    } else {
      messages_.handle(record, payload);
    }
    return true;
  }
  if (record.kind == RecordKind::kCredit) {
    messages_.handle(record, payload);
    return true;
  }
  if (record.kind == RecordKind::kAsk || record.kind == RecordKind::kAnswer) {
    handleAsk(record);
    return true;
  }
  return false;
}

bool Group::compareCalls(const Record& record) {
  const auto it = operations_.find(record.sequence);
  const auto& [sequence, recent] = recent_[record.sequence % recent_.size()];
  OperationKind kind = recent.operation;
  const MessageDescription* own = &recent;
  if (it != operations_.end() && it->second->posted()) {
    kind = it->second->operationKind();
    own = isScheduled(kind)
              ? &static_cast<ScheduledCollective&>(*it->second).description()
              : nullptr;
  } else if (sequence != record.sequence || recent.total == kNoCall) {
    return false;
  }
  if (kind != record.operation) {
    failKinds(
        record.sequence,
        {topology().rank(), kind},
        {record.source, record.operation});
    return true;
  }
  const std::string text = messages_.disagreement(record, *own);
  if (!text.empty()) {
    failMismatch(concat(nameOf(kind), " number ", record.sequence), text);
  }
  return true;
}

void Group::handleLate(
    const Record& record, std::span<const std::byte> payload, bool byNetwork) {
  if (record.kind == RecordKind::kMessage && compareCalls(record)) {
    failMismatch(
        concat(nameOf(record.operation), " number ", record.sequence), "");
    return;
  }
  if (record.kind != RecordKind::kCast ||
      record.operation != OperationKind::kAllToAll) {
    throw TransportError(concat(
        "a record for ",
        nameOf(record.operation),
        " number ",
        record.sequence,
        " that is over"));
  }
  // Merged rows of which none are for this rank any more.
  if (byNetwork) {
    relayCast(record, payload, topology().rank(), mates(), engine_.memory());
  } else {
    releaseUnread(record, byNetwork);
  }
}

void Group::handleCollective(
    const Record& record, std::span<const std::byte> payload, bool byNetwork) {
  const auto it = operation(record.sequence, record.operation, record.source);
  if (it == nullptr) {
    releaseUnread(record, byNetwork);
    return;
  }
  const bool isPosted = record.kind == RecordKind::kPosted;
  if (record.kind >= RecordKind::kMessage) {
    if (!isScheduled(record.operation)) {
      throw TransportError(concat(
          "a message of rank ", record.source, " came for ", it->title()));
    }
    if (record.kind == RecordKind::kMessage) {
      static_cast<ScheduledCollective&>(*it).check(record);
    }
    if (!failed()) {
      messages_.handle(record, payload);
    } else {
      releaseUnread(record, byNetwork);
    }
    return;
  }
  if (byNetwork && isPosted && record.operation == OperationKind::kAllToAll) {
    handlePacket(*it, record, payload);
    return;
  }
  if (byNetwork && (isPosted || record.kind == RecordKind::kCast)) {
    handleCast(*it, record, payload);
    return;
  }
  switch (record.kind) {
    case RecordKind::kPosted:
      it->sourcePosted(record, payload);
      break;
    case RecordKind::kPayload:
      it->chunkArrived(record, payload);
      break;
    case RecordKind::kStaged:
      it->chunkStaged(record);
      break;
    case RecordKind::kCast:
      it->castArrived(record, payload);
      break;
    case RecordKind::kReadDone:
      it->blockRead(record);
      break;
    case RecordKind::kReadConfirmed:
      it->readConfirmed(record);
      break;
    default:
      throw TransportError("a record of a kind that is not known");
  }
}

void Group::handleRefused(
    const Record& record, std::span<const std::byte> payload, bool byNetwork) {
  if (byNetwork) {
    tellMates(record, payload);
  }
  const auto it = operations_.find(record.sequence);
  const bool isPosted = it != operations_.end() && it->second->posted();
  if (!isPosted && record.sequence < nextSequence_) {
    throw TransportError(concat(
        "operation number ", record.sequence, " was refused after its end"));
  }
  refusedByOthers_[record.sequence] = std::string(
      reinterpret_cast<const char*>(payload.data()), payload.size());
  if (isPosted) {
    failRefused(record.sequence);
  }
}

void Group::failRefused(uint64_t sequence) {
  fail(FailureKind::kMismatch, refusedByOthers_.at(sequence));
}

void Group::releaseUnread(const Record& record, bool byNetwork) {
  const bool relayed = (record.kind == RecordKind::kPosted ||
                        record.kind == RecordKind::kCast) &&
                       !byNetwork && record.carrier == Carrier::kExtent;
  if (relayed || record.kind == RecordKind::kStaged ||
      record.kind == RecordKind::kMessageStaged) {
    Mate& owner = mate(relayed ? record.owner : record.source);
    NodeMemory::doneReading(owner.segment(), record.place);
    owner.wake();
  }
}

std::vector<Mate*> Group::mates() const {
  std::vector<Mate*> mates;
  for (int rank : topology().ranksOf(topology().node())) {
    if (rank != topology().rank()) {
      mates.push_back(membership_.peers[static_cast<size_t>(rank)]->mate);
    }
  }
  return mates;
}

void Group::handleCast(
    Collective& to, const Record& record, std::span<const std::byte> payload) {
  if (record.bytes != payload.size() || record.carrier == Carrier::kExtent) {
    throw TransportError(concat(
        "a chunk of ", record.bytes, " bytes came with ", payload.size()));
  }
  if (record.operation == OperationKind::kCombine) {
    Record told = record;  // the sums are for this rank alone
    told.carrier = Carrier::kNone;
    told.sendBytes = told.bytes = 0;
    relayCast(told, {}, topology().rank(), mates(), engine_.memory());
  } else {
    relayCast(record, payload, topology().rank(), mates(), engine_.memory());
  }
  if (record.kind == RecordKind::kPosted) {
    to.sourcePosted(record, payload);
  } else {
    to.castArrived(record, payload);
  }
}

void Group::handlePacket(
    Collective& to, const Record& record, std::span<const std::byte> payload) {
  const Packet packet = decodePacket(payload, topology().localSize());
  counters_.relayedPackets += packet.hasBlocks() ? 1 : 0;
  std::vector<Mate*> mates;
  for (int rank : topology().ranksOf(topology().node())) {
    const bool self = rank == topology().rank();
    mates.push_back(self ? nullptr : peer(rank).mate);
  }
  relayPacket(record, packet, topology(), mates, engine_.memory());
  const auto local = static_cast<size_t>(topology().localRank());
  Record own = record;
  own.destination = topology().rank();
  own.sendBytes = packet.sizes[local].sendBytes;
  own.receiveBytes = packet.sizes[local].receiveBytes;
  own.carrier = own.sendBytes == 0   ? Carrier::kNone
                : packet.hasBlocks() ? Carrier::kInline
                                     : Carrier::kLater;
  std::span<const std::byte> block;
  if (packet.hasBlocks()) {
    block = packet.blocks[local];
  }
  to.sourcePosted(own, block);
}

}  // namespace automoe
