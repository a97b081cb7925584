// SPDX-License-Identifier: Apache-2.0
// The world of the doubles: what the test asks of it.
#include <stdexcept>
#include <utility>

#include "cuda/double_device.hpp"
#include "cuda/double_state.hpp"

namespace automoe::testing {

DoubleWorld::State::State(int size, unsigned seed)
    : ranks(static_cast<size_t>(size)), streams(size, seed) {
  const Lock lock(streams.mutex());
  streams.onError(
      [this](int rank, const std::string& text) { fail(rank, text); });
  streams.onDone([this](int rank) { at(rank).statistics.items += 1; });
}

void DoubleWorld::State::enqueue(
    int rank,
    const char* name,
    Device::Stream stream,
    const std::function<std::optional<StreamItem>(DoubleStream&)>& make) {
  call(rank, name, [&](auto&) {
    const uint64_t n = ++at(rank).statistics.enqueued;
    if (at(rank).failures.contains(n)) {
      throw DeviceError(concat("call ", n, " fails, as failAt() asked"));
    }
    if (at(rank).foreignFailures.contains(n)) {
      throw std::runtime_error(concat("call ", n, " fails in another way"));
    }
    const auto found = streams.find(rank, stream);
    auto item = make(*found);
    if (!item) {
      return;
    }
    if (found->capture != nullptr) {
      found->capture->add(*found, std::move(*item));
    } else {
      streams.enqueue(*found, std::move(*item));
    }
  });
}

void DoubleWorld::State::fail(int rank, const std::string& text) {
  errors.push_back(concat("rank ", rank, ": ", text));
  if (at(rank).error.empty()) {
    at(rank).error = text;
  }
}

DoubleWorld::DoubleWorld(int size, unsigned seed)
    : state_(std::make_unique<State>(size, seed)) {}

DoubleWorld::~DoubleWorld() {
  state_->streams.stop();
}

void DoubleWorld::adopt(int rank, void* memory, size_t bytes) {
  const State::Lock lock(state_->streams.mutex());
  state_->memory.adopt(rank, static_cast<std::byte*>(memory), bytes);
}

void DoubleWorld::disown(int rank, void* memory) {
  const State::Lock lock(state_->streams.mutex());
  state_->memory.disown(rank, static_cast<std::byte*>(memory));
}

void DoubleWorld::failAt(int rank, uint64_t n, bool foreign) {
  const State::Lock lock(state_->streams.mutex());
  State::Rank& it = state_->at(rank);
  (foreign ? it.foreignFailures : it.failures).insert(n);
}

void DoubleWorld::failCalls(int rank, const std::string& method, int times) {
  const State::Lock lock(state_->streams.mutex());
  state_->at(rank).failingCalls[method] = times;
}

void DoubleWorld::setCapturing(int rank, bool capturing) {
  const State::Lock lock(state_->streams.mutex());
  state_->at(rank).capturing = capturing;
}

void DoubleWorld::stall(int rank) {
  const State::Lock lock(state_->streams.mutex());
  state_->streams.stall(rank, true);
}

void DoubleWorld::resume(int rank) {
  const State::Lock lock(state_->streams.mutex());
  state_->streams.stall(rank, false);
}

void DoubleWorld::setPatience(std::chrono::milliseconds patience) {
  const State::Lock lock(state_->streams.mutex());
  state_->streams.setPatience(patience);
}

void DoubleWorld::settle() {
  State::Lock lock(state_->streams.mutex());
  state_->streams.settle(lock);
}

std::string DoubleWorld::deadlocked() const {
  const State::Lock lock(state_->streams.mutex());
  return state_->streams.deadlock();
}

std::vector<std::string> DoubleWorld::errors() const {
  const State::Lock lock(state_->streams.mutex());
  return state_->errors;
}

std::vector<std::string> DoubleWorld::leaks(int rank) const {
  const State::Lock lock(state_->streams.mutex());
  auto found = state_->memory.leaks(rank);
  for (auto& stream : state_->streams.leaks(rank)) {
    found.push_back(std::move(stream));
  }
  for (const auto& [number, event] : state_->events) {
    if (event.rank == rank) {
      found.push_back(concat("event ", number));
    }
  }
  return found;
}

DoubleWorld::Statistics DoubleWorld::statistics(int rank) const {
  const State::Lock lock(state_->streams.mutex());
  return state_->at(rank).statistics;
}

}  // namespace automoe::testing
