// SPDX-License-Identifier: Apache-2.0
// What the caller asks of a group.
#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/combine.hpp"
#include "process_group/exchange/device_call.hpp"
#include "process_group/exchange/dispatch.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"
#include "process_group/exchange/plan_exchange.hpp"
#include "process_group/exchange/scheduled.hpp"

namespace automoe {

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

std::shared_ptr<Operation> Group::deviceCall(
    OperationKind kind,
    const DeviceCallFacts& facts,
    DeviceStreams streams,
    std::chrono::milliseconds timeout,
    OperationCallbacks callbacks) {
  return post(
      kind,
      timeout,
      std::move(callbacks),
      [&](Collective& it, Operation::Clock::time_point deadline) {
        static_cast<DeviceCall&>(it).post(facts, std::move(streams), deadline);
      });
}

std::shared_ptr<Operation> Group::collective(
    ScheduledArguments arguments,
    std::chrono::milliseconds timeout,
    OperationCallbacks callbacks) {
  const OperationKind kind = arguments.description.operation;
  return post(
      kind,
      timeout,
      std::move(callbacks),
      [&](Collective& it, Operation::Clock::time_point deadline) {
        static_cast<ScheduledCollective&>(it).post(
            std::move(arguments), deadline);
      });
}

std::shared_ptr<PairOperation> Group::send(
    const PairArguments& arguments,
    std::chrono::milliseconds timeout,
    OperationCallbacks callbacks) {
  return postPair(true, arguments, timeout, std::move(callbacks));
}

std::shared_ptr<PairOperation> Group::receive(
    const PairArguments& arguments,
    std::chrono::milliseconds timeout,
    OperationCallbacks callbacks) {
  return postPair(false, arguments, timeout, std::move(callbacks));
}

std::shared_ptr<PairOperation> Group::postPair(
    bool sends,
    const PairArguments& arguments,
    std::chrono::milliseconds timeout,
    OperationCallbacks callbacks) {
  const int peer = arguments.peer;
  const bool any = !sends && peer == PairArguments::kAnySource;
  if (!any &&
      (peer < 0 || peer >= topology().size() || peer == topology().rank())) {
    throw InvalidArgument(concat(
        sends ? "send: dst is " : "recv: src is ",
        peer,
        ", expected another rank of group ",
        name(),
        ", which has ",
        topology().size(),
        "; this is rank ",
        topology().rank()));
  }
  engine_.checkForked();
  const std::lock_guard lock(engine_.mutex());
  checkOpen();
  counters_.operations += 1;
  const auto posted = std::make_shared<PairOperation>(
      pairNumber_++, deadlineAfter(timeout), sends, arguments);
  posted->setCallbacks(std::move(callbacks));
  if (sends) {
    pairs_.send(posted);
  } else {
    pairs_.receive(posted);
  }
  engine_.kick();
  return posted;
}

// With the engine's lock.
void Group::checkOpen() {
  engine_.checkUsable();
  if (leaving_) {
    throw InvalidArgument(
        concat("group ", name(), " has been destroyed on this rank"));
  }
  if (failed()) {
    std::rethrow_exception(makeError(""));
  }
}

std::shared_ptr<Operation> Group::post(
    OperationKind kind,
    std::chrono::milliseconds timeout,
    OperationCallbacks callbacks,
    const Start& start) {
  engine_.checkForked();
  const std::lock_guard lock(engine_.mutex());
  checkOpen();
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
    start(*posted, deadlineAfter(timeout));
  } catch (const Error& error) {
    // Of what another rank had sent for it before.
    fail(FailureKind::kTransport, error.what());
  }
  engine_.kick();
  return posted;
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

}  // namespace automoe
