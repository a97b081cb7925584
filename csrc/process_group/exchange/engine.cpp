// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/engine.hpp"

#include <sys/epoll.h>
#include <sys/random.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"

namespace automoe {
namespace {

using std::chrono::milliseconds;

// After a wait() the caller will most likely post and wait again: for this
// long the thread leaves the driving to it.
constexpr auto kHandBack = std::chrono::microseconds(500);
constexpr auto kHousekeeping = milliseconds(10);
// A process says goodbye before it closes its connections, but perhaps on
// another path; so long it may take.
constexpr auto kGoodbyeGrace = milliseconds(200);
// What has been sent leaves within this time, or its receiver is gone.
constexpr auto kFlush = milliseconds(500);

uint64_t randomId() {
  uint64_t id = 0;
  AUTOMOE_CHECK(
      ::getrandom(&id, sizeof(id), 0) == sizeof(id), "getrandom failed");
  return id;
}

}  // namespace

Engine::Engine(Config config)
    : config_(std::move(config)),
      process_(randomId()),
      memory_(process_, config_),
      transfers_(memory_, config_.eagerBytes),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      peers_(config_) {
  AUTOMOE_CHECK(epoll_.valid(), "epoll_create1: ", strerror(errno));
  setLogLevel(config_.logLevel);
  for (int fd : memory_.descriptors()) {
    watch(fd);
  }
  thread_ = std::thread([this] { threadMain(); });
}

Engine::~Engine() {
  if (!forked_) {
    shutdown(milliseconds(0));
  } else {
    thread_.detach();  // it does not exist in this process
  }
}

void Engine::checkForked() const {
  if (forked()) {
    throw InvalidArgument(
        "this process was forked from one that had used the automoe backend; "
        "make the process group in the child, or start it by spawn");
  }
}

void Engine::checkUsable() const {
  checkForked();
  if (shutDown_) {
    throw InvalidArgument("the automoe backend has been shut down");
  }
}

Network& Engine::network() {
  AUTOMOE_CHECK(network_ != nullptr, "the group has one node, no network");
  return *network_;
}

// ---- who drives ----
//
// One thread at a time makes progress: it holds the role `driving_`. A caller
// of wait() takes the role if it is free; the own thread only while nobody
// waits. Handing the role to the thread after every wait() would cost two
// context switches an operation, so the thread lets kHandBack pass first.

bool Engine::wait(const Operation& operation, Clock::time_point until) {
  if (operation.finished()) {
    return true;
  }
  checkForked();
  const auto begin = Clock::now();
  Lock lock(mutex_);
  waiters_ += 1;
  waits_ += 1;
  if (driving_ && asleep_) {
    memory_.ring();  // the thread hands over
  }
  while (!operation.finished() && Clock::now() < until) {
    if (driving_) {
      driverFree_.wait_until(lock, until);
      continue;
    }
    driving_ = true;
    const bool worked = progress();
    if (operation.finished()) {
      // Nothing more to do here.
    } else if (worked) {
      // Others may post, or look at their operations, between two rounds.
      lock.unlock();
      lock.lock();
    } else {
      rest(lock, until);
    }
    driving_ = false;
    if (waiters_ > 1) {
      driverFree_.notify_all();
    }
  }
  waiters_ -= 1;
  lastWait_ = Clock::now();
  counters_.waitMicros += static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::microseconds>(lastWait_ - begin)
          .count());
  if (waiters_ == 0 && threadParked_) {
    threadWake_.notify_one();
  }
  return operation.finished();
}

void Engine::threadMain() {
  Lock lock(mutex_);
  uint64_t seenWaits = 0;
  while (!stop_) {
    if (waiters_ > 0 && waits_ == seenWaits) {
      // Somebody waits for longer: it will say when it stops.
      threadParked_ = true;
      threadWake_.wait(lock);
      threadParked_ = false;
      continue;
    }
    if (waiters_ > 0 || Clock::now() - lastWait_ < kHandBack) {
      seenWaits = waits_;
      threadWake_.wait_for(lock, kHandBack);
      continue;
    }
    driving_ = true;
    const bool worked = progress();
    if (!worked && waiters_ == 0 && !stop_) {
      rest(lock, Clock::time_point::max());
    }
    driving_ = false;
    if (waiters_ > 0) {
      driverFree_.notify_all();
    } else if (worked) {
      // A mutex is not fair; let callers in.
      lock.unlock();
      std::this_thread::yield();
      lock.lock();
    }
  }
}

void Engine::kick() {
  if (driving_ && asleep_) {
    memory_.ring();
  } else if (!driving_) {
    transfers_.advance();
  }
}

template <typename Step>
bool Engine::guarded(const Step& step) {
  try {
    return step();
  } catch (const std::exception& error) {
    // Not of one message or one peer: those have been handled. What is left
    // (the network, the system) concerns every group.
    log(LogLevel::kWarn, error.what());
    groups_.forEach([&](Group& group) {
      group.fail(FailureKind::kTransport, error.what());
    });
    return true;
  }
}

bool Engine::progress() {
  return guarded([this] { return moveEverything(); });
}

void Engine::rest(Lock& lock, Clock::time_point until) {
  guarded([&] {
    sleep(lock, until);
    return true;
  });
}

bool Engine::moveEverything() {
  bool worked = drainMailboxes();
  if (network_ != nullptr) {
    worked = network_->progress() || worked;
  }
  worked = transfers_.advance() || worked;
  for (const auto& mate : peers_.mates()) {
    worked = (!mate->flushed() && mate->flush()) || worked;
  }
  housekeeping();
  return worked;
}

void Engine::sleep(Lock& lock, Clock::time_point until) {
  memory_.prepareToSleep();
  // From here on mates ring. What they did before that is looked at once
  // more: mail, room in their mailboxes, chunks that they have read.
  bool more = transfers_.advance();
  for (const auto& mate : peers_.mates()) {
    more =
        !mate->inbox().empty() || (!mate->flushed() && mate->flush()) || more;
  }
  if (more || (network_ != nullptr && !network_->arm())) {
    memory_.wokeUp();
    return;
  }
  const auto timeout = sleepAtMost(until);
  asleep_ = true;
  lock.unlock();
  std::array<epoll_event, 64> events;
  const int count = ::epoll_wait(
      epoll_.get(),
      events.data(),
      static_cast<int>(events.size()),
      static_cast<int>(timeout.count()));
  lock.lock();
  asleep_ = false;
  memory_.wokeUp();
  for (int i = 0; i < count; ++i) {
    handleEvent(events[static_cast<size_t>(i)].data.fd);
  }
}

milliseconds Engine::sleepAtMost(Clock::time_point until) const {
  auto timeout = milliseconds(-1);
  if (polling_ > 0) {
    timeout = kHousekeeping;
  } else if (!suspects_.empty()) {
    timeout = milliseconds(50);
  } else if (groups_.anyBusy()) {
    timeout = milliseconds(500);  // deadlines are looked at
  }
  if (until != Clock::time_point::max()) {
    const auto left = std::clamp<milliseconds>(
        std::chrono::ceil<milliseconds>(until - Clock::now()),
        milliseconds(0),
        std::chrono::hours(1));
    timeout = timeout.count() < 0 ? left : std::min(timeout, left);
  }
  return timeout;
}

// ---- failures ----

void Engine::processUnreachable(uint64_t process, const std::string& cause) {
  suspects_.push_back({process, cause, Clock::now()});
}

void Engine::checkSuspects(Clock::time_point now) {
  // Stable, as the first that broke is at fault: others may have left for it.
  const auto ripe = std::stable_partition(
      suspects_.begin(), suspects_.end(), [&](const Suspect& it) {
        return now - it.since < kGoodbyeGrace;
      });
  const std::vector<Suspect> gone(ripe, suspects_.end());
  suspects_.erase(ripe, suspects_.end());
  for (const Suspect& it : gone) {
    failPeer(it.process, concat("the connection to it broke: ", it.cause));
  }
}

void Engine::failPeer(uint64_t process, const std::string& cause) {
  if (const Peer* peer = peers_.find(process)) {
    groups_.forEach([&](Group& group) { group.peerGone(*peer, cause); });
  }
}

void Engine::housekeeping() {
  memory_.collect();
  const auto now = Clock::now();
  if (now - lastHousekeeping_ < kHousekeeping) {
    return;
  }
  lastHousekeeping_ = now;
  checkSuspects(now);
  groups_.forEach([now](Group& group) { group.checkDeadlines(now); });
  groups_.removeEnded();
  if (groups_.empty()) {
    peers_.forgetGone();
  }
}

// ---- the rest ----

EngineCounters Engine::counters() {
  const Lock lock(mutex_);
  if (network_ != nullptr) {
    counters_.network = network_->counters();
  }
  counters_.nodeMemoryBytes = memory_.allocatedBytes();
  return counters_;
}

std::string Engine::waitsFor(const Operation& operation) {
  const Lock lock(mutex_);
  return operation.waitsFor();
}

std::string Engine::describeNetwork() {
  const Lock lock(mutex_);
  return network_ == nullptr ? std::string() : network_->describe();
}

void Engine::shutdown(milliseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  std::vector<std::shared_ptr<Group>> groups;
  {
    const Lock lock(mutex_);
    if (shutDown_) {
      return;
    }
    shutDown_ = true;
    groups = groups_.all();
  }
  for (const auto& group : groups) {
    group->leave(
        std::chrono::duration_cast<milliseconds>(deadline - Clock::now()));
  }
  Lock lock(mutex_);
  const auto needed = [&] {
    const auto& mates = peers_.mates();
    return std::any_of(
               groups.begin(),
               groups.end(),
               [](const auto& it) { return !it->over(); }) ||
           std::any_of(mates.begin(), mates.end(), [](const auto& it) {
             return !it->flushed();
           });
  };
  while (needed() && Clock::now() < deadline) {
    driverFree_.wait_for(lock, milliseconds(5));
  }
  stop_ = true;
  memory_.ring();
  threadWake_.notify_all();
  lock.unlock();
  thread_.join();
  lock.lock();
  if (network_ != nullptr) {
    network_->close(Clock::now() + kFlush);
    counters_.network = network_->counters();
    transfers_.setNetwork(nullptr);
    network_.reset();
  }
}

}  // namespace automoe
