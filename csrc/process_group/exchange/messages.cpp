// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/messages.hpp"

#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/agreement.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {
Messages::Messages(Group& group)
    : group_(group), credits_(static_cast<size_t>(group.topology().size())) {}

MessageKey Messages::keyOf(const Record& record) {
  return {
      .pair = record.operation == OperationKind::kPair,
      .sequence = record.sequence,
      .peer = record.source,
      .slot = record.rows};
}

Record Messages::makeRecord(
    RecordKind kind,
    const MessageKey& key,
    const MessageDescription& description) const {
  Record record = group_.makeRecord(kind, key.sequence, key.peer);
  record.operation = description.operation;
  record.rows = key.slot;
  record.dtype = description.dtype;
  record.scalarBytes = description.reduction;
  record.owner = description.root;
  record.receiveBytes = description.total;
  record.plan = description.tag;
  return record;
}

// ---- receiving ----

void Messages::receive(MessageReceive receive) {
  const MessageKey key = receive.key;
  const auto it = kept_.find(key);
  if (it != kept_.end()) {
    const Kept kept = std::move(it->second);
    kept_.erase(it);
    take(
        kept.record,
        std::as_bytes(std::span(kept.payload)),
        std::move(receive));
    return;
  }
  const Topology& topology = group_.topology();
  Incoming& incoming = incoming_[key];
  incoming.receive = std::move(receive);
  if (topology.nodeOf(key.peer) != topology.node() &&
      incoming.receive.bytes > group_.engine().config().eagerBytes) {
    tellReady(incoming);
  }
}

void Messages::tellReady(Incoming& incoming) {
  const MessageKey& key = incoming.receive.key;
  const Record record =
      makeRecord(RecordKind::kMessageReady, key, incoming.receive.description);
  incoming.readySent = true;
  group_.tell(key.peer, record);
}

bool Messages::agrees(const Record& record, const MessageReceive& receive) {
  Record own =
      makeRecord(RecordKind::kMessage, receive.key, receive.description);
  own.sendBytes = receive.bytes;
  const std::string text = findMessageDisagreement(
      record,
      own,
      receive.description.dtypeName,
      receive.description.reductionName);
  if (text.empty()) {
    return true;
  }
  group_.failMismatch(
      receive.key.pair
          ? concat("the message with tag ", record.plan)
          : concat(nameOf(record.operation), " number ", record.sequence),
      text);
  return false;
}

std::string Messages::disagreement(
    const Record& theirs, const MessageDescription& own) const {
  Record record = makeRecord(RecordKind::kMessage, keyOf(theirs), own);
  record.sendBytes = theirs.sendBytes;
  return findMessageDisagreement(
      theirs, record, own.dtypeName, own.reductionName);
}

std::string Messages::disagreementOfKept(
    uint64_t sequence, const MessageDescription& own) const {
  for (auto it = kept_.lower_bound({.sequence = sequence});
       it != kept_.end() && !it->first.pair && it->first.sequence == sequence;
       ++it) {
    const std::string text = disagreement(it->second.record, own);
    if (!text.empty()) {
      return text;
    }
  }
  return "";
}

void Messages::take(
    const Record& record,
    std::span<const std::byte> payload,
    MessageReceive receive) {
  if (!agrees(record, receive)) {
    return;
  }
  const MessageKey key = receive.key;
  Incoming& incoming = incoming_[key];
  if (incoming.receive.operation == nullptr) {
    incoming.receive = std::move(receive);
  }
  incoming.announced = true;
  switch (record.carrier) {
    case Carrier::kNone:
      finish(key);
      break;
    case Carrier::kInline:
      std::memcpy(incoming.receive.to, payload.data(), payload.size());
      consumed(key.peer, payload.size());
      finish(key);
      break;
    case Carrier::kCrossMemory:
      readFromMate(record, key);
      break;
    default:
      if (!incoming.readySent) {
        tellReady(incoming);
      }
      finishIfWhole(key);
      break;
  }
}

void Messages::consumed(int peer, uint64_t bytes) {
  Credit& credit = credits_[static_cast<size_t>(peer)];
  credit.consumed += bytes + kOverhead;
  if (credit.consumed < group_.engine().config().unmatchedBytes / 4) {
    return;
  }
  Record record = group_.makeRecord(RecordKind::kCredit, 0, peer);
  record.sendBytes = std::exchange(credit.consumed, 0);
  group_.tell(peer, record);
}

void Messages::checkForm(
    const Record& record, std::span<const std::byte> payload) const {
  const Topology& topology = group_.topology();
  const bool mate = topology.nodeOf(record.source) == topology.node();
  if ((record.carrier == Carrier::kNone) != (record.sendBytes == 0) ||
      record.carrier == Carrier::kExtent ||
      (record.carrier == Carrier::kCrossMemory && !mate) ||
      record.carrier > Carrier::kLater ||
      payload.size() !=
          (record.carrier == Carrier::kInline ? record.sendBytes : 0)) {
    throw TransportError(concat(
        "a message of ",
        record.sendBytes,
        " bytes by carrier ",
        static_cast<int>(record.carrier),
        " with ",
        payload.size()));
  }
}

void Messages::arrived(
    const Record& record, std::span<const std::byte> payload) {
  const MessageKey key = keyOf(record);
  const auto it = incoming_.find(key);
  if (it != incoming_.end() && !it->second.announced) {
    take(record, payload, it->second.receive);
    return;
  }
  const bool isNew =
      it == incoming_.end() &&
      kept_
          .emplace(
              key,
              Kept{
                  record,
                  std::string(
                      reinterpret_cast<const char*>(payload.data()),
                      payload.size())})
          .second;
  if (!isNew) {
    throw TransportError(
        concat("rank ", record.source, " sent one message twice"));
  }
}

void Messages::chunkArrived(
    const Record& record, std::span<const std::byte> payload) {
  const auto it = incoming_.find(keyOf(record));
  if (it == incoming_.end() || payload.size() != record.bytes ||
      record.offset > it->second.receive.bytes ||
      record.bytes > it->second.receive.bytes - record.offset) {
    throw TransportError(concat(
        "a chunk of ",
        record.bytes,
        " bytes at ",
        record.offset,
        " fits no message from rank ",
        record.source));
  }
  Incoming& incoming = it->second;
  std::memcpy(
      incoming.receive.to + record.offset, payload.data(), payload.size());
  incoming.got += payload.size();
  finishIfWhole(it->first);
}

void Messages::finishIfWhole(const MessageKey& key) {
  const auto it = incoming_.find(key);
  // The chunks may overtake the record.
  if (it != incoming_.end() && it->second.announced &&
      it->second.got == it->second.receive.bytes) {
    finish(key);
  }
}

void Messages::finish(const MessageKey& key) {
  const auto it = incoming_.find(key);
  const MessageReceive receive = std::move(it->second.receive);
  incoming_.erase(it);
  receive.done();
}

void Messages::readFromMate(const Record& record, const MessageKey& key) {
  const MessageReceive& receive = incoming_[key].receive;
  MateRead job;
  job.operation = receive.operation;
  job.mate = &group_.mate(key.peer);
  job.address = record.place;
  job.to = receive.to;
  job.bytes = receive.bytes;
  job.failures = record.failures;
  job.done = [this, key](bool certain) { readEnded(key, certain, ""); };
  job.failed = [this, key](bool certain, const std::string& cause) {
    if (certain) {
      group_.peerGone(group_.peer(key.peer), cause);
    } else {
      readEnded(key, false, cause);
    }
  };
  group_.engine().transfers().add(std::move(job));
}

void Messages::readEnded(
    const MessageKey& key, bool certain, const std::string& error) {
  Incoming& incoming = incoming_[key];
  Record answer =
      makeRecord(RecordKind::kMessageRead, key, incoming.receive.description);
  if (!certain) {
    // A group of its rank has failed since it sent: was it this one?
    incoming.unconfirmed = true;
    incoming.readError = error;
    answer.carrier = Carrier::kLater;
  }
  group_.mate(key.peer).post(asBytes(answer));
  if (certain) {
    finish(key);
  }
}

void Messages::confirmed(const Record& record) {
  const MessageKey key = keyOf(record);
  const auto it = incoming_.find(key);
  if (it == incoming_.end() || !it->second.unconfirmed) {
    throw TransportError("a read was confirmed that nobody asked about");
  }
  if (it->second.readError.empty()) {
    finish(key);
  } else {
    group_.peerGone(group_.peer(key.peer), it->second.readError);
  }
}

// ---- records ----

void Messages::handle(
    const Record& record, std::span<const std::byte> payload) {
  switch (record.kind) {
    case RecordKind::kMessage:
      checkForm(record, payload);
      arrived(record, payload);
      break;
    case RecordKind::kMessageReady:
      ready(record);
      break;
    case RecordKind::kMessageChunk:
      chunkArrived(record, payload);
      break;
    case RecordKind::kMessageStaged: {
      Mate& mate = group_.mate(record.source);
      chunkArrived(
          record,
          {mate.segment().at(record.place, record.bytes), record.bytes});
      NodeMemory::doneReading(mate.segment(), record.place);
      mate.wake();  // its slot is free again
      break;
    }
    case RecordKind::kMessageRead:
      readDone(record);
      break;
    case RecordKind::kMessageConfirmed:
      confirmed(record);
      break;
    default: {
      Credit& credit = credits_[static_cast<size_t>(record.source)];
      if (record.sendBytes > credit.unmatched) {
        throw TransportError("a rank gives back more than it got");
      }
      credit.unmatched -= record.sendBytes;
      break;
    }
  }
}

void Messages::abandon() {
  outgoing_.clear();
  earlyReady_.clear();
  incoming_.clear();
  kept_.clear();
}

}  // namespace automoe
