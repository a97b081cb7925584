// SPDX-License-Identifier: Apache-2.0
// The sender's side of messages.
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/collective.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"
#include "process_group/exchange/messages.hpp"

namespace automoe {
namespace {

// Copied twice through a mailbox rather than read from the other process: a
// system call and an answer cost more than the second copy of so few bytes.
constexpr uint64_t kMailboxBytes = 8 * 1024;
// Copied before it is sent, so that the sender need not wait until it has left.
constexpr uint64_t kCopiedBytes = 8 * 1024;

}  // namespace

bool Messages::tryRide(int peer, uint64_t bytes) {
  Credit& credit = credits_[static_cast<size_t>(peer)];
  const size_t cap = group_.engine().config().unmatchedBytes;
  if (bytes + kOverhead > cap - credit.unmatched) {
    return false;
  }
  credit.unmatched += bytes + kOverhead;
  return true;
}

void Messages::send(MessageSend send) {
  Record record = makeRecord(RecordKind::kMessage, send.key, send.description);
  record.sendBytes = send.bytes;
  const Topology& topology = group_.topology();
  if (topology.nodeOf(send.key.peer) == topology.node()) {
    sendToMate(std::move(send), record);
  } else {
    sendToNode(std::move(send), record);
  }
}

void Messages::sendToMate(MessageSend send, Record record) {
  Mate& mate = group_.mate(send.key.peer);
  if (send.bytes == 0) {
    record.carrier = Carrier::kNone;
    mate.post(asBytes(record));
    send.done();
    return;
  }
  GroupCounters& counters = group_.mutableCounters();
  if (send.bytes <= kMailboxBytes && tryRide(send.key.peer, send.bytes)) {
    record.carrier = Carrier::kInline;
    record.bytes = send.bytes;
    counters.inlineBlocks += 1;
    mate.post(asBytes(record), {send.data, send.bytes});
    send.done();
    return;
  }
  if (mate.description().readsUs) {
    record.carrier = Carrier::kCrossMemory;
    record.place = reinterpret_cast<uint64_t>(send.data);
    counters.readBlocks += 1;
  } else {
    record.carrier = Carrier::kLater;
    counters.stagedBlocks += 1;
  }
  outgoing_.emplace(send.key, std::move(send));
  mate.post(asBytes(record));
}

void Messages::sendToNode(MessageSend send, Record record) {
  Engine& engine = group_.engine();
  const uint64_t process = group_.peer(send.key.peer).process;
  GroupCounters& counters = group_.mutableCounters();
  counters.networkPayloadBytes += send.bytes;
  const bool rides =
      send.bytes == 0 || (send.bytes <= engine.config().eagerBytes &&
                          tryRide(send.key.peer, send.bytes));
  if (!rides) {
    record.carrier = Carrier::kLater;
    engine.network().send(process, asBytes(record), {}, [](bool) {});
    counters.directBlocks += 1;
    if (earlyReady_.erase(send.key) > 0) {
      stream(std::move(send));
    } else {
      outgoing_.emplace(send.key, std::move(send));
    }
    return;
  }
  record.carrier = send.bytes == 0 ? Carrier::kNone : Carrier::kInline;
  record.bytes = send.bytes;
  counters.packets += send.bytes > 0 ? 1 : 0;
  if (send.bytes <= kCopiedBytes) {
    std::string copy(reinterpret_cast<const char*>(send.data), send.bytes);
    engine.network().send(
        process, asBytes(record), {}, [](bool) {}, std::move(copy));
    send.done();
    return;
  }
  send.operation->pin();
  const std::span<const std::byte> payload(send.data, send.bytes);
  engine.network().send(
      process, asBytes(record), payload, [send = std::move(send)](bool ok) {
        if (ok && !send.operation->finished()) {
          send.done();
        }
        send.operation->unpin();
      });
}

void Messages::stream(MessageSend send) {
  const Topology& topology = group_.topology();
  const int peer = send.key.peer;
  const bool mate = topology.nodeOf(peer) == topology.node();
  const Record record = makeRecord(
      mate ? RecordKind::kMessageStaged : RecordKind::kMessageChunk,
      send.key,
      send.description);
  if (mate) {
    StagedSend job;
    job.operation = send.operation;
    job.mates = {group_.peer(peer).mate};
    job.record = record;
    job.data = send.data;
    job.bytes = send.bytes;
    job.done = std::move(send.done);
    group_.engine().transfers().add(std::move(job));
    return;
  }
  DirectSend job;
  job.operation = send.operation;
  job.process = group_.peer(peer).process;
  job.record = record;
  job.data = send.data;
  job.bytes = send.bytes;
  job.order = {send.key.pair ? 0 : send.key.sequence, rotation(topology, peer)};
  job.done = std::move(send.done);
  group_.engine().transfers().add(std::move(job));
}

void Messages::ready(const Record& record) {
  const auto it = outgoing_.find(keyOf(record));
  if (it == outgoing_.end()) {
    earlyReady_.insert(keyOf(record));
    return;
  }
  MessageSend send = std::move(it->second);
  outgoing_.erase(it);
  stream(std::move(send));
}

void Messages::readDone(const Record& record) {
  const auto it = outgoing_.find(keyOf(record));
  if (it == outgoing_.end()) {
    throw TransportError("a message was read that was not sent");
  }
  if (record.carrier == Carrier::kLater) {
    // Some group of ours failed meanwhile; not this one, or we would not be
    // here, so the memory was there all the time.
    const Record answer = makeRecord(
        RecordKind::kMessageConfirmed, it->first, it->second.description);
    group_.mate(record.source).post(asBytes(answer));
  }
  const MessageSend send = std::move(it->second);
  outgoing_.erase(it);
  send.done();
}

}  // namespace automoe
