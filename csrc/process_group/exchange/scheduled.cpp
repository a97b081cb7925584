// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/scheduled.hpp"

#include <cstring>
#include <set>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {

ScheduledCollective::ScheduledCollective(
    Group& group, uint64_t sequence, OperationKind kind)
    : Collective(group, sequence, kind) {}

void ScheduledCollective::sourcePosted(
    const Record& record, std::span<const std::byte>) {
  throw TransportError(concat(
      "a record of rank ", record.source, " for ", title(), " is no message"));
}

void ScheduledCollective::post(
    ScheduledArguments arguments, Clock::time_point deadline) {
  arguments_ = std::move(arguments);
  openSteps(deadline);
  const auto& steps = arguments_.schedule.steps();
  addSteps(steps.size());
  states_.assign(steps.size(), State::kWaits);
  waits_.reserve(steps.size());
  if (failIf(group_.messages().disagreementOfKept(
          sequence(), arguments_.description))) {
    return;
  }
  for (const Step& step : steps) {
    waits_.push_back(step.waitsFor);
  }
  for (uint32_t i = 0; i < steps.size(); ++i) {
    if (waits_[i] == 0) {
      ready_.push_back(i);
    }
  }
  run();
  if (!finished()) {
    group_.remember(sequence(), arguments_.description);
    stepDone();
  }
}

void ScheduledCollective::check(const Record& record) {
  if (posted()) {
    failIf(group_.messages().disagreement(record, arguments_.description));
  }
}

bool ScheduledCollective::failIf(const std::string& disagreement) {
  if (disagreement.empty()) {
    return false;
  }
  group_.failMismatch(title(), disagreement);
  return true;
}

// In the order in which they became possible, which is that of the schedule's
// rotation. A step that ends at once makes others possible: not by recursion,
// which would be as deep as the schedule is long.
void ScheduledCollective::run() {
  if (running_) {
    return;
  }
  running_ = true;
  while (!ready_.empty() && !finished()) {
    const uint32_t next = ready_.front();
    ready_.pop_front();
    begin(next);
  }
  running_ = false;
}

MessageKey ScheduledCollective::keyOf(const Step& step) const {
  return {
      .pair = false,
      .sequence = sequence(),
      .peer = step.peer,
      .slot = step.slot};
}

void ScheduledCollective::begin(uint32_t index) {
  const Step& step = arguments_.schedule.steps()[index];
  states_[index] = State::kBegun;
  switch (step.kind) {
    case Step::Kind::kSend:
      group_.messages().send(
          {.operation = shared_from_this(),
           .key = keyOf(step),
           .description = arguments_.description,
           .data = step.from,
           .bytes = step.bytes,
           .done = [this, index] { ended(index); }});
      break;
    case Step::Kind::kReceive:
      group_.messages().receive(
          {.operation = shared_from_this(),
           .key = keyOf(step),
           .description = arguments_.description,
           .to = step.to,
           .bytes = step.bytes,
           .done = [this, index] { ended(index); }});
      break;
    case Step::Kind::kReduce:
      kernels::reduceElements(
          arguments_.reduction, step.to, step.inputs, step.bytes, step.last);
      ended(index);
      break;
    case Step::Kind::kCopy:
      std::memcpy(step.to, step.from, step.bytes);
      ended(index);
      break;
  }
}

void ScheduledCollective::ended(uint32_t index) {
  if (finished()) {
    return;
  }
  states_[index] = State::kEnded;
  for (const uint32_t next : arguments_.schedule.steps()[index].then) {
    waits_[next] -= 1;
    if (waits_[next] == 0) {
      ready_.push_back(next);
    }
  }
  const auto self = shared_from_this();  // the last step lets go of it
  run();
  if (!finished()) {
    stepDone();
  }
}

std::string ScheduledCollective::peersOf(Step::Kind kind) const {
  std::set<int> peers;
  const auto& steps = arguments_.schedule.steps();
  for (size_t i = 0; i < steps.size(); ++i) {
    if (steps[i].kind == kind && states_[i] == State::kBegun) {
      peers.insert(steps[i].peer);
    }
  }
  std::string text;
  for (const int peer : peers) {
    text += concat(text.empty() ? "" : ", ", peer);
  }
  return text;
}

std::string ScheduledCollective::waitsFor() const {
  if (!posted()) {
    return "this rank to call it";
  }
  const std::string sources = peersOf(Step::Kind::kReceive);
  const std::string readers = peersOf(Step::Kind::kSend);
  std::string text;
  if (!sources.empty()) {
    text = concat("bytes from ranks: ", sources);
  }
  if (!readers.empty()) {
    text += concat(
        text.empty() ? "" : "; ", "ranks that have not taken ours: ", readers);
  }
  return text.empty() ? "its sends to leave" : text;
}

}  // namespace automoe
