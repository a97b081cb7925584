// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/group.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"
#include "process_group/exchange/combine.hpp"
#include "process_group/exchange/dispatch.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/plan_exchange.hpp"

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
  return post(
      OperationKind::kAllToAll,
      timeout,
      std::move(callbacks),
      [&](Collective& it, Operation::Clock::time_point deadline) {
        static_cast<AllToAll&>(it).post(std::move(arguments), deadline);
      });
}

std::shared_ptr<Operation> Group::plan(
    std::shared_ptr<RouteBuilder> builder,
    std::chrono::milliseconds timeout,
    OperationCallbacks callbacks) {
  return post(
      OperationKind::kPlan,
      timeout,
      std::move(callbacks),
      [&](Collective& it, Operation::Clock::time_point deadline) {
        static_cast<PlanExchange&>(it).post(std::move(builder), deadline);
      });
}

std::shared_ptr<Operation> Group::dispatch(
    DispatchArguments arguments,
    std::chrono::milliseconds timeout,
    OperationCallbacks callbacks) {
  const Route route(arguments.route);
  checkRoute(route);
  clearPadding(arguments);
  moveOwnRows(route, arguments);
  return post(
      OperationKind::kDispatch,
      timeout,
      std::move(callbacks),
      [&](Collective& it, Operation::Clock::time_point deadline) {
        static_cast<Dispatch&>(it).post(std::move(arguments), route, deadline);
      });
}

std::shared_ptr<Operation> Group::combine(
    CombineArguments arguments,
    std::chrono::milliseconds timeout,
    OperationCallbacks callbacks) {
  const Route route(arguments.route);
  checkRoute(route);
  return post(
      OperationKind::kCombine,
      timeout,
      std::move(callbacks),
      [&](Collective& it, Operation::Clock::time_point deadline) {
        static_cast<Combine&>(it).post(std::move(arguments), route, deadline);
      });
}

void Group::checkRoute(const Route& route) const {
  const Topology& own = topology();
  const auto nodes = route.nodeOfRank();
  bool same = route.rank() == own.rank() && route.size() == own.size() &&
              route.numNodes() == own.numNodes();
  for (int rank = 0; same && rank < own.size(); ++rank) {
    same = nodes[static_cast<size_t>(rank)] == own.nodeOf(rank);
  }
  if (!same) {
    throw InvalidArgument(concat(
        "plan: it was made for rank ",
        route.rank(),
        " of ",
        route.size(),
        " on ",
        route.numNodes(),
        " nodes, but this is rank ",
        own.rank(),
        " of ",
        own.size(),
        " on ",
        own.numNodes(),
        " in group ",
        name(),
        "; use a plan with the group that made it"));
  }
}

std::shared_ptr<Operation> Group::post(
    OperationKind kind,
    std::chrono::milliseconds timeout,
    OperationCallbacks callbacks,
    const Start& start) {
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
  auto posted = operation(sequence, kind, topology().rank());
  counters_.operations += 1;
  if (posted == nullptr) {  // the group has failed
    posted = make(sequence, kind, topology().rank());
    posted->setCallbacks(std::move(callbacks));
    posted->finish(makeError(""));
    engine_.kick();
    return posted;
  }
  posted->setCallbacks(std::move(callbacks));
  for (size_t rank = 0; rank < left_.size(); ++rank) {
    if (left_[rank] && sequence >= leftAt_[rank]) {
      fail(
          FailureKind::kPeer,
          concat("rank ", rank, " has left group ", name()));
      engine_.kick();
      return posted;
    }
  }
  if (refusedByOthers_.contains(sequence)) {
    failRefused(sequence);
    engine_.kick();
    return posted;
  }
  try {
    start(*posted, after(timeout));
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
  std::vector<std::shared_ptr<Collective>> pending;
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
              " while ",
              it->title(),
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

void Group::refuse(const std::string& text) {
  engine_.checkForked();
  const std::lock_guard lock(engine_.mutex());
  engine_.checkUsable();
  if (leaving_ || failed()) {
    return;
  }
  const uint64_t sequence = nextSequence_++;
  refusedByOthers_.erase(sequence);
  refused_.insert(sequence);
  const auto it = operations_.find(sequence);
  if (it != operations_.end()) {  // others have posted it, and will fail
    const auto theirs = it->second;
    operations_.erase(it);
    theirs->abandon();
  }
  Record record = makeRecord(RecordKind::kRefused, sequence, 0);
  const auto payload =
      std::as_bytes(std::span(text).first(std::min(text.size(), kTextBytes)));
  record.bytes = payload.size();
  tellMates(record, payload);
  tellNodes(record, payload);
  engine_.kick();
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
    if (it->posted()) {
      it->remind(now);
    }
    if (it->posted() && it->deadline() < now) {
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
