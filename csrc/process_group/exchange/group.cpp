// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/group.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/relay.hpp"

namespace automoe {
namespace {

// Of a failure that is told to others; names of many ranks may be longer.
constexpr size_t kTextBytes = 4 * 1024;

// A timeout that means "never" must not overflow.
Operation::Clock::time_point after(std::chrono::milliseconds timeout) {
  constexpr auto kLongest = std::chrono::hours(24 * 365);
  return Operation::Clock::now() +
         std::min<std::chrono::milliseconds>(timeout, kLongest);
}

}  // namespace

Group::Group(Engine& engine, Membership membership)
    : engine_(engine),
      membership_(std::move(membership)),
      left_(static_cast<size_t>(topology().size())),
      leftAt_(static_cast<size_t>(topology().size())) {}

Record Group::makeRecord(
    RecordKind kind, uint64_t sequence, int destination) const {
  Record record;
  record.kind = kind;
  record.group = membership_.id;
  record.sequence = sequence;
  record.source = topology().rank();
  record.destination = destination;
  record.failures = engine_.memory().segment().header().failures.load();
  return record;
}

Mate& Group::mate(int rank) {
  Peer* peer = membership_.peers[static_cast<size_t>(rank)];
  if (peer == nullptr || peer->mate == nullptr ||
      topology().nodeOf(rank) != topology().node()) {
    throw TransportError(concat("rank ", rank, " is no node-mate"));
  }
  return *peer->mate;
}

// ---- the caller's side ----

std::shared_ptr<Operation> Group::allToAll(
    AllToAllArguments arguments,
    std::chrono::milliseconds timeout,
    OperationCallbacks callbacks) {
  const auto size = static_cast<size_t>(topology().size());
  const auto self = static_cast<size_t>(topology().rank());
  if (arguments.sends.size() != size || arguments.receives.size() != size) {
    throw InvalidArgument(concat(
        "all_to_all: ",
        arguments.sends.size(),
        " input and ",
        arguments.receives.size(),
        " output blocks, expected one for each of ",
        size,
        " ranks"));
  }
  const auto& mine = arguments.sends[self];
  const auto& own = arguments.receives[self];
  if (mine.bytes != own.bytes) {
    throw InvalidArgument(concat(
        "all_to_all: rank ",
        self,
        " sends ",
        mine.bytes,
        " bytes to itself, but expects ",
        own.bytes));
  }
  if (own.bytes > 0) {
    std::memmove(own.data, mine.data, own.bytes);
  }
  engine_.checkForked();
  const std::lock_guard lock(engine_.mutex());
  engine_.checkUsable();
  if (leaving_) {
    throw InvalidArgument(
        concat("group ", name(), " has been destroyed on this rank"));
  }
  if (failed()) {
    std::rethrow_exception(makeError(""));
  }
  const uint64_t sequence = nextSequence_++;
  const auto posted = operation(sequence);
  posted->setCallbacks(std::move(callbacks));
  counters_.operations += 1;
  for (size_t rank = 0; rank < size; ++rank) {
    if (left_[rank] && sequence >= leftAt_[rank]) {
      fail(
          FailureKind::kPeer,
          concat("rank ", rank, " has left group ", name()));
      engine_.kick();
      return posted;
    }
  }
  try {
    posted->post(std::move(arguments), after(timeout));
  } catch (const Error& error) {
    // Of what another rank had sent for it before.
    fail(FailureKind::kTransport, error.what());
  }
  engine_.kick();
  return posted;
}

void Group::leave(std::chrono::milliseconds timeout) {
  if (engine_.forked()) {
    return;
  }
  const auto until = after(timeout);
  std::vector<std::shared_ptr<AllToAll>> pending;
  {
    const std::lock_guard lock(engine_.mutex());
    for (const auto& [sequence, it] : operations_) {
      if (it->posted()) {
        pending.push_back(it);
      }
    }
  }
  for (const auto& it : pending) {
    engine_.wait(*it, until);
  }
  const std::lock_guard lock(engine_.mutex());
  if (leaving_) {
    return;
  }
  for (const auto& [sequence, it] : operations_) {
    if (it->posted()) {
      fail(
          FailureKind::kAborted,
          concat(
              "rank ",
              topology().rank(),
              " destroyed group ",
              name(),
              " while all_to_all number ",
              sequence,
              " waited for ",
              it->waitsFor()));
      break;
    }
  }
  leaving_ = true;
  if (!failed()) {
    const Record record = makeRecord(RecordKind::kLeaving, nextSequence_, 0);
    tellMates(record, {});
    tellNodes(record, {});
  }
  engine_.kick();
}

void Group::abort(const std::string& reason) {
  if (engine_.forked()) {
    return;
  }
  const std::lock_guard lock(engine_.mutex());
  if (!leaving_) {
    fail(
        FailureKind::kAborted,
        concat(
            "rank ",
            topology().rank(),
            " aborted group ",
            name(),
            ": ",
            reason));
    engine_.kick();
  }
}

std::exception_ptr Group::failure() {
  engine_.checkForked();
  const std::lock_guard lock(engine_.mutex());
  return failed() ? makeError("") : nullptr;
}

GroupCounters Group::counters() {
  const std::lock_guard lock(engine_.mutex());
  return counters_;
}

// ---- what arrives ----

std::shared_ptr<AllToAll> Group::operation(uint64_t sequence) {
  std::shared_ptr<AllToAll>& it = operations_[sequence];
  if (it == nullptr) {
    it = std::make_shared<AllToAll>(*this, sequence);
  }
  return it;
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
  if (failed()) {
    releaseUnread(record, byNetwork);
    return;
  }
  if (record.kind == RecordKind::kPosted && byNetwork) {
    handlePacket(record, payload);
    return;
  }
  if (record.sequence < nextSequence_ &&
      operations_.find(record.sequence) == operations_.end()) {
    throw TransportError(concat(
        "a record for all_to_all number ", record.sequence, " that is over"));
  }
  const auto it = operation(record.sequence);
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

void Group::releaseUnread(const Record& record, bool byNetwork) {
  const bool relayed = record.kind == RecordKind::kPosted && !byNetwork &&
                       record.carrier == Carrier::kExtent;
  if (relayed || record.kind == RecordKind::kStaged) {
    Mate& owner = mate(relayed ? record.owner : record.source);
    NodeMemory::doneReading(owner.segment(), record.place);
    owner.wake();
  }
}

void Group::handlePacket(
    const Record& record, std::span<const std::byte> payload) {
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
  operation(record.sequence)->sourcePosted(own, block);
}

// ---- the end of a group ----

void Group::fail(FailureKind kind, const std::string& text, bool tellOthers) {
  if (failed()) {
    return;
  }
  failureKind_ = kind;
  failureText_ = text;
  failure_ = makeError("");
  log(LogLevel::kInfo, concat("group ", name(), " failed: ", text));
  // Mates that are reading our tensors must not believe what they read.
  engine_.memory().segment().header().failures.fetch_add(1);
  const auto operations = std::exchange(operations_, {});
  for (const auto& [sequence, it] : operations) {
    it->abandon();
    if (it->posted()) {
      it->finish(makeError(concat(
          "all_to_all number ", sequence, " waited for ", it->waitsFor())));
    } else {
      it->finish(failure_);
    }
  }
  if (tellOthers && !leaving_) {
    Record record = makeRecord(RecordKind::kFailed, 0, 0);
    record.dtype = static_cast<uint8_t>(kind);
    const auto payload =
        std::as_bytes(std::span(text).first(std::min(text.size(), kTextBytes)));
    record.bytes = payload.size();
    tellMates(record, payload);
    tellNodes(record, payload);
  }
}

std::exception_ptr Group::makeError(const std::string& waitedFor) const {
  std::string text = failureText_;
  if (!waitedFor.empty()) {
    text += concat(" [rank ", topology().rank(), ": ", waitedFor, "]");
  }
  text += "; the group cannot be used any more, destroy it";
  switch (failureKind_) {
    case FailureKind::kMismatch:
      return std::make_exception_ptr(InvalidArgument(text));
    case FailureKind::kPeer:
      return std::make_exception_ptr(PeerFailedError(text));
    case FailureKind::kTimeout:
      return std::make_exception_ptr(TimeoutError(text));
    default:
      return std::make_exception_ptr(TransportError(text));
  }
}

void Group::handleFailed(
    const Record& record, std::span<const std::byte> payload, bool byNetwork) {
  const std::string text(
      reinterpret_cast<const char*>(payload.data()), payload.size());
  if (byNetwork && !failed()) {
    tellMates(record, payload);
  }
  fail(static_cast<FailureKind>(record.dtype), text, false);
}

void Group::handleLeaving(const Record& record, bool byNetwork) {
  if (byNetwork) {
    tellMates(record, {});
  }
  const auto rank = static_cast<size_t>(record.source);
  left_[rank] = true;
  leftAt_[rank] = record.sequence;
  for (const auto& [sequence, it] : operations_) {
    if (it->posted() && sequence >= record.sequence &&
        !it->hasPosted(record.source)) {
      fail(
          FailureKind::kPeer,
          concat("rank ", record.source, " has left group ", name()));
      return;
    }
  }
}

void Group::tellMates(
    const Record& record, std::span<const std::byte> payload) {
  for (int rank : topology().ranksOf(topology().node())) {
    if (rank != topology().rank() && rank != record.source) {
      peer(rank).mate->post(asBytes(record), payload);
    }
  }
}

void Group::tellNodes(
    const Record& record, std::span<const std::byte> payload) {
  for (int node = 0; node < topology().numNodes(); ++node) {
    if (node != topology().node()) {
      engine_.network().send(
          peer(topology().railPeer(node)).process,
          asBytes(record),
          {},
          [](bool) {},
          std::string(
              reinterpret_cast<const char*>(payload.data()), payload.size()));
    }
  }
}

void Group::peerGone(const Peer& gone, const std::string& cause) {
  for (int rank = 0; rank < topology().size(); ++rank) {
    const auto index = static_cast<size_t>(rank);
    if (membership_.peers[index] != &gone || left_[index]) {
      continue;
    }
    if (leaving_) {
      left_[index] = true;
      return;
    }
    const auto& numbers = membership_.globalRanks;
    const int globalRank = numbers.empty() ? rank : numbers[index];
    fail(
        FailureKind::kPeer,
        concat(
            "rank ",
            globalRank,
            globalRank == rank
                ? std::string()
                : concat(", which is rank ", rank, " of group ", name(), ","),
            " (",
            gone.host,
            " pid ",
            gone.pid,
            ") is gone: ",
            cause));
  }
}

void Group::checkDeadlines(Operation::Clock::time_point now) {
  for (const auto& [sequence, it] : operations_) {
    if (it->posted() && it->deadline() < now) {
      fail(
          FailureKind::kTimeout,
          concat(
              "rank ",
              topology().rank(),
              " timed out in all_to_all number ",
              sequence,
              " of group ",
              name(),
              ", waiting for ",
              it->waitsFor()));
      return;
    }
  }
}

bool Group::over() const {
  if (!leaving_) {
    return false;
  }
  if (failed() || topology().numNodes() == 1) {
    return true;
  }
  // Packets for mates come to this rank until they have left too.
  for (int rank : topology().ranksOf(topology().node())) {
    if (rank != topology().rank() && !left_[static_cast<size_t>(rank)]) {
      return false;
    }
  }
  return true;
}

}  // namespace automoe
