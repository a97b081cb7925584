// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_turns.hpp"

#include <algorithm>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"

namespace automoe {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr auto kPoll = milliseconds(1);
constexpr auto kReplayPoll = milliseconds(20);

}  // namespace

DeviceTurns::DeviceTurns(
    Engine& engine, std::shared_ptr<Device> device, Hooks hooks)
    : engine_(engine), device_(std::move(device)), hooks_(std::move(hooks)) {
  watcher_ = std::thread([this] { watch(); });
}

DeviceTurns::~DeviceTurns() {
  end(milliseconds(0));
}

std::shared_ptr<DeviceTurn> DeviceTurns::begin(
    std::shared_ptr<const void> keeps) {
  forgetEnded();
  const auto turn = std::make_shared<DeviceTurn>(
      std::make_shared<DeviceEvent>(device_), std::move(keeps));
  const Lock lock(mutex_);
  turns_.push_back(turn);
  changed_.notify_all();
  return turn;
}

DeviceStreams DeviceTurns::streamsOf(const std::shared_ptr<DeviceTurn>& turn) {
  DeviceStreams streams;
  streams.happened = [turn] {
    if (turn->state_ == State::kBroken) {
      throw DeviceError(turn->error_);
    }
    return through(*turn);
  };
  streams.failed = [this, turn] {
    const Lock lock(mutex_);
    turn->pinned_ = true;
  };
  return streams;
}

void DeviceTurns::posted(
    DeviceTurn& turn, std::shared_ptr<Operation> operation) {
  const Lock lock(mutex_);
  turn.operation_ = std::move(operation);
}

void DeviceTurns::enqueued(DeviceTurn& turn, bool captured) {
  const Lock lock(mutex_);
  if (captured) {
    captured_.push_back(turn.keeps_);
  }
  turn.state_ = captured ? State::kCaptured : State::kEnqueued;
  changed_.notify_all();
}

void DeviceTurns::drop(DeviceTurn& turn) {
  turn.state_ = State::kThrough;
}

void DeviceTurns::lose(DeviceTurn& turn) {
  lost_ = true;
  drop(turn);
}

bool DeviceTurns::through(const DeviceTurn& turn) {
  const State state = turn.state_;
  return state != State::kPosting && state != State::kEnqueued;
}

// ---- the thread that looks ----

void DeviceTurns::watch() {
  Lock lock(mutex_);
  while (!stopping_) {
    const bool replaying = !captured_.empty() && !failed_;
    if (replaying) {
      lock.unlock();
      hooks_.replaying();
      lock.lock();
    }
    if (turns_.empty() && !stopping_) {
      if (replaying) {
        changed_.wait_for(lock, kReplayPoll);
      } else {
        changed_.wait(lock);
      }
      continue;
    }
    const auto open = std::ranges::find_if(
        turns_, [](const auto& turn) { return !through(*turn); });
    const auto oldest = open == turns_.end() ? nullptr : *open;
    lock.unlock();
    if (oldest != nullptr && !failed_) {
      hooks_.waiting();
    }
    if (oldest != nullptr && oldest->state_ == State::kEnqueued) {
      look(*oldest);
    }
    const bool moved = oldest != nullptr && through(*oldest);
    forgetEnded();
    lock.lock();
    if (!moved && !stopping_) {
      changed_.wait_for(lock, kPoll);
    }
  }
}

void DeviceTurns::look(DeviceTurn& turn) {
  try {
    if (device_->happened(turn.done_->get())) {
      turn.state_ = State::kThrough;
    }
  } catch (const std::exception& error) {
    turn.error_ = error.what();
    lost_ = true;
    turn.state_ = State::kBroken;
  }
}

/// A turn is kept until its operation has ended: so the engine's thread is
/// never the last to have it, and calls nothing of the device.
void DeviceTurns::forgetEnded() {
  std::vector<std::shared_ptr<DeviceTurn>> ended;  // destroyed without the lock
  std::vector<std::shared_ptr<Operation>> pinned;
  {
    const Lock lock(mutex_);
    std::erase_if(turns_, [&](const std::shared_ptr<DeviceTurn>& turn) {
      const auto& operation = turn->operation_;
      if (!through(*turn) || (operation != nullptr && !operation->finished())) {
        return false;
      }
      if (turn->pinned_ && operation != nullptr) {
        pinned.push_back(operation);
      }
      ended.push_back(turn);
      return true;
    });
    if (!ended.empty()) {
      changed_.notify_all();
    }
  }
  if (!pinned.empty()) {
    const std::lock_guard lock(engine_.mutex());
    for (const auto& operation : pinned) {
      operation->unpin();
    }
  }
}

// ---- the end, and after a failure ----

void DeviceTurns::fail() {
  const Lock lock(mutex_);
  if (!failed_.exchange(true) && !stopping_) {
    releaser_ = std::thread([this] { releaseUntilThrough(); });
  }
  changed_.notify_all();
}

void DeviceTurns::releaseUntilThrough() {
  hooks_.failed();
  Lock lock(mutex_);
  // Again and again: whoever waited for a flag clears it, and the next one on
  // the stream may wait for the same.
  const auto maybeMore = [this] { return !captured_.empty() || lost_; };
  while (!stopping_ && (!turns_.empty() || (maybeMore() && !ending_))) {
    lock.unlock();
    hooks_.release();
    lock.lock();
    changed_.wait_for(lock, kPoll);
  }
}

bool DeviceTurns::awaitThrough(steady_clock::time_point limit) {
  Lock lock(mutex_);
  while (!turns_.empty() && !failed_ && steady_clock::now() < limit) {
    changed_.wait_for(lock, kPoll);
  }
  return turns_.empty() && !failed_;
}

bool DeviceTurns::end(milliseconds patience) {
  std::thread releaser;
  bool all = true;
  {
    Lock lock(mutex_);
    ending_ = true;
    const auto limit = steady_clock::now() + patience;
    while (!turns_.empty() && steady_clock::now() < limit) {
      changed_.wait_for(lock, kPoll);
    }
    all = turns_.empty() && !lost_;
    stopping_ = true;
    changed_.notify_all();
    releaser = std::move(releaser_);
  }
  for (std::thread* thread : {&releaser, &watcher_}) {
    if (thread->joinable()) {
      thread->join();
    }
  }
  captured_.clear();
  return all;
}

}  // namespace automoe
