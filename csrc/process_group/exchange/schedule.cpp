// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/schedule.hpp"

#include <numeric>
#include <utility>

#include "process_group/common/error.hpp"

namespace automoe {

Schedule::Id Schedule::add(Step step, After after) {
  const auto id = static_cast<Id>(steps_.size());
  step.waitsFor = static_cast<uint32_t>(after.size());
  for (const Id before : after) {
    AUTOMOE_CHECK(before < id, "a step comes after one that is not there");
    steps_[before].then.push_back(id);
  }
  steps_.push_back(std::move(step));
  return id;
}

Schedule::Id Schedule::send(
    int peer,
    uint32_t slot,
    const std::byte* from,
    uint64_t bytes,
    After after) {
  Step step;
  step.kind = Step::Kind::kSend;
  step.peer = peer;
  step.slot = slot;
  step.from = from;
  step.bytes = bytes;
  return add(std::move(step), after);
}

Schedule::Id Schedule::receive(
    int peer, uint32_t slot, std::byte* to, uint64_t bytes, After after) {
  Step step;
  step.kind = Step::Kind::kReceive;
  step.peer = peer;
  step.slot = slot;
  step.to = to;
  step.bytes = bytes;
  return add(std::move(step), after);
}

Schedule::Id Schedule::reduce(
    std::byte* to,
    std::vector<const std::byte*> inputs,
    uint64_t bytes,
    bool last,
    After after) {
  Step step;
  step.kind = Step::Kind::kReduce;
  step.to = to;
  step.inputs = std::move(inputs);
  step.bytes = bytes;
  step.last = last;
  return add(std::move(step), after);
}

Schedule::Id Schedule::copy(
    std::byte* to, const std::byte* from, uint64_t bytes, After after) {
  Step step;
  step.kind = Step::Kind::kCopy;
  step.from = from;
  step.to = to;
  step.bytes = bytes;
  return add(std::move(step), after);
}

std::byte* Schedule::scratch(uint64_t bytes) {
  // Not make_unique, which would write zeros.
  scratch_.emplace_back(new std::byte[bytes]);
  return scratch_.back().get();
}

std::vector<Schedule::Id> Schedule::all() const {
  std::vector<Id> ids(steps_.size());
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

}  // namespace automoe
