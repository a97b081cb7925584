// SPDX-License-Identifier: Apache-2.0
// What arrives for a group.
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/combine.hpp"
#include "process_group/exchange/dispatch.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"
#include "process_group/exchange/plan_exchange.hpp"
#include "process_group/exchange/relay.hpp"

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
  // The lower rank first, so that every rank says the same.
  int low = it->second->firstRank();
  int high = rank;
  const char* lowCalls = nameOf(it->second->operationKind());
  const char* highCalls = nameOf(kind);
  if (high < low) {
    std::swap(low, high);
    std::swap(lowCalls, highCalls);
  }
  fail(
      FailureKind::kMismatch,
      concat(
          "operation number ",
          sequence,
          " of group ",
          name(),
          " is ",
          lowCalls,
          " on rank ",
          low,
          ", but ",
          highCalls,
          " on rank ",
          high,
          "; all ranks must call the same collectives in the same order"));
  return nullptr;
}

void Group::operationEnded(uint64_t sequence) {
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
  if (failed() || refused_.contains(record.sequence)) {
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

void Group::handleLate(
    const Record& record, std::span<const std::byte> payload, bool byNetwork) {
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
  if (relayed || record.kind == RecordKind::kStaged) {
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
