// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/group.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/scheduled.hpp"

namespace automoe {
namespace {

// A message of a rank that has left may come on another path than its goodbye.
constexpr auto kLastMessages = std::chrono::seconds(1);
constexpr size_t kRecent = 32;
// The next step where nothing has failed.
constexpr const char* kRaise = "; raise the timeout if ranks may be so late";

}  // namespace

Group::Group(Engine& engine, Membership membership)
    : engine_(engine),
      membership_(std::move(membership)),
      left_(static_cast<size_t>(topology().size())),
      leftAt_(static_cast<size_t>(topology().size())),
      leftSince_(static_cast<size_t>(topology().size())),
      messages_(*this),
      pairs_(*this),
      recent_(kRecent, {0, MessageDescription{.total = kNoCall}}) {}

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

// ---- the end of a group's use ----

void Group::leave(std::chrono::milliseconds timeout) {
  if (engine_.forked()) {
    return;
  }
  const auto until = deadlineAfter(timeout);
  std::vector<std::shared_ptr<Operation>> pending;
  {
    const std::lock_guard lock(engine_.mutex());
    for (const auto& [sequence, it] : operations_) {
      if (it->posted()) {
        pending.push_back(it);
      }
    }
    pending.insert(
        pending.end(), pairs_.pending().begin(), pairs_.pending().end());
  }
  for (const auto& it : pending) {
    engine_.wait(*it, until);
  }
  const std::lock_guard lock(engine_.mutex());
  if (leaving_) {
    return;
  }
  const auto failPending = [this](const auto& it) {
    fail(
        FailureKind::kAborted,
        concat(
            "rank ",
            topology().rank(),
            " destroyed group ",
            name(),
            " while ",
            it->title(),
            " waited for ",
            it->waitsFor()));
  };
  for (const auto& [sequence, it] : operations_) {
    if (it->posted()) {
      failPending(it);
      break;
    }
  }
  if (!pairs_.empty()) {
    failPending(pairs_.pending().front());
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

void Group::giveUp(const std::string& text, FailureKind kind) {
  engine_.checkForked();
  const std::lock_guard lock(engine_.mutex());
  if (!leaving_) {
    fail(kind, text);
    engine_.kick();
  }
}

std::exception_ptr Group::failure() {
  engine_.checkForked();
  const std::lock_guard lock(engine_.mutex());
  return failed() ? makeError("") : nullptr;
}

void Group::onFailure(std::function<void()> hook) {
  const std::lock_guard lock(engine_.mutex());
  failureHook_ = std::move(hook);
  if (failed() && failureHook_) {
    std::exchange(failureHook_, {})();
  }
}

GroupCounters Group::counters() {
  const std::lock_guard lock(engine_.mutex());
  return counters_;
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
      it->finish(
          makeError(concat(it->title(), " waited for ", it->waitsFor())));
    } else {
      it->finish(failure_);
    }
  }
  for (const auto& it : pairs_.abandon()) {
    it->finish(makeError(concat(it->title(), " waited for ", it->waitsFor())));
  }
  messages_.abandon();
  if (const auto hook = std::exchange(failureHook_, {})) {
    hook();
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
  leftSince_[rank] = Operation::Clock::now();
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
  std::vector<std::shared_ptr<Collective>> pending;  // some may end here
  for (const auto& [sequence, it] : operations_) {
    pending.push_back(it);
  }
  for (const auto& it : pending) {
    if (it->posted() && !it->finished()) {
      it->remind(now);
    }
    if (it->finished()) {
      continue;
    }
    std::string answers;
    if (it->posted() && it->deadline() < now && inquire(*it, now, answers)) {
      fail(
          FailureKind::kTimeout,
          concat(
              "rank ",
              topology().rank(),
              " timed out in ",
              it->title(),
              " of group ",
              name(),
              ", waiting for ",
              it->waitsFor(),
              answers,
              kRaise));
      return;
    }
  }
  checkPairs(now);
}

bool Group::inquire(
    const Collective& late,
    Operation::Clock::time_point now,
    std::string& text) {
  if (!isScheduled(late.operationKind())) {
    return true;  // it has been told who has posted
  }
  const auto it = inquiries_.find(late.sequence());
  if (it == inquiries_.end()) {
    inquiries_.emplace(
        late.sequence(), Inquiry(topology().size(), topology().rank(), now));
    for (int rank = 0; rank < topology().size(); ++rank) {
      if (rank != topology().rank()) {
        // With what the call is, for whoever has made another.
        tell(
            rank,
            messages_.makeRecord(
                RecordKind::kAsk,
                {.sequence = late.sequence(), .peer = rank},
                static_cast<const ScheduledCollective&>(late).description()));
      }
    }
    return false;
  }
  if (!it->second.over(now)) {
    return false;
  }
  text = concat("; ", it->second.result());
  return true;
}

void Group::tell(int rank, const Record& record) {
  if (topology().nodeOf(rank) == topology().node()) {
    mate(rank).post(asBytes(record));
  } else {
    engine_.network().send(
        peer(rank).process, asBytes(record), {}, [](bool) {});
  }
}

void Group::handleAsk(const Record& record) {
  if (record.kind == RecordKind::kAsk) {
    compareCalls(record);
    Record answer =
        makeRecord(RecordKind::kAnswer, record.sequence, record.source);
    answer.rows = record.sequence < nextSequence_ ? 1 : 0;
    tell(record.source, answer);
    return;
  }
  const auto it = inquiries_.find(record.sequence);
  if (it != inquiries_.end()) {
    it->second.answered(record.source, record.rows != 0);
  }
}

void Group::checkPairs(Operation::Clock::time_point now) {
  pairs_.lapse(now);
  for (const auto& it : pairs_.pending()) {
    if (it->mayLapse()) {
      continue;
    }
    for (size_t rank = 0; rank < left_.size(); ++rank) {
      if (left_[rank] && now - leftSince_[rank] > kLastMessages &&
          it->needs(static_cast<int>(rank))) {
        fail(
            FailureKind::kPeer,
            concat(
                "rank ",
                rank,
                " has left group ",
                name(),
                "; ",
                it->title(),
                " waited for it"));
        return;
      }
    }
    if (it->deadline() < now) {
      fail(
          FailureKind::kTimeout,
          concat(
              "rank ",
              topology().rank(),
              " timed out in ",
              it->title(),
              " in group ",
              name(),
              ", waiting for ",
              it->waitsFor(),
              kRaise));
      return;
    }
  }
}

void Group::remember(uint64_t sequence, const MessageDescription& description) {
  recent_[sequence % kRecent] = {sequence, description};
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
