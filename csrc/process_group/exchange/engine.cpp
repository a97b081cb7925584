// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/engine.hpp"

#include <sys/epoll.h>
#include <sys/random.h>

#include <algorithm>
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
constexpr size_t kEarlyBytes = size_t{256} << 20;
constexpr int kMessagesPerMailbox = 64;

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
      epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  AUTOMOE_CHECK(epoll_.valid(), "epoll_create1: ", strerror(errno));
  setLogLevel(config_.logLevel);
  watchNew();
  thread_ = std::thread([this] { threadMain(); });
}

Engine::~Engine() {
  if (!forked_) {
    shutdown(milliseconds(0));
  } else {
    thread_.detach();  // it does not exist in this process
  }
}

void Engine::checkUsable() const {
  if (forked_) {
    throw InvalidArgument(
        "this process was forked from one that had used the automoe backend; "
        "make the process group in the child, or start it by spawn");
  }
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
    if (!worked && !operation.finished()) {
      sleep(lock, until);
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
      sleep(lock, Clock::time_point::max());
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

bool Engine::progress() {
  bool worked = drainMailboxes();
  if (network_ != nullptr) {
    worked = network_->progress() || worked;
  }
  worked = transfers_.advance() || worked;
  for (const auto& mate : mates_) {
    worked = (!mate->flushed() && mate->flush()) || worked;
  }
  housekeeping();
  return worked;
}

void Engine::sleep(Lock& lock, Clock::time_point until) {
  memory_.prepareToSleep();
  const bool ready =
      std::all_of(mates_.begin(), mates_.end(), [](const auto& mate) {
        return mate->inbox().empty();
      });
  if (!ready || (network_ != nullptr && !network_->arm())) {
    memory_.wokeUp();
    return;
  }
  milliseconds timeout = milliseconds(-1);
  const bool busy =
      std::any_of(groups_.begin(), groups_.end(), [](const auto& it) {
        return it.second->busy();
      });
  if (!suspects_.empty()) {
    timeout = milliseconds(50);
  } else if (busy) {
    timeout = milliseconds(500);
  }
  if (until != Clock::time_point::max()) {
    const auto left = std::chrono::ceil<milliseconds>(until - Clock::now());
    const auto bounded = std::max(left, milliseconds(0));
    timeout = timeout.count() < 0 ? bounded : std::min(timeout, bounded);
  }
  asleep_ = true;
  lock.unlock();
  epoll_event events[64];
  const int count = ::epoll_wait(
      epoll_.get(),
      events,
      64,
      static_cast<int>(std::min<int64_t>(timeout.count(), 1 << 30)));
  lock.lock();
  asleep_ = false;
  memory_.wokeUp();
  std::vector<int> ready_fds;
  for (int i = 0; i < count; ++i) {
    ready_fds.push_back(events[i].data.fd);
  }
  handleEvents(ready_fds);
}

// ---- mates and messages ----

void Engine::watch(int fd) {
  epoll_event event = {};
  event.events = EPOLLIN;
  event.data.fd = fd;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0 &&
      errno != EEXIST) {
    throw TransportError(concat("epoll_ctl: ", strerror(errno)));
  }
}

void Engine::watchNew() {
  for (int fd : memory_.descriptors()) {
    watch(fd);
  }
}

void Engine::handleEvents(const std::vector<int>& ready) {
  for (int fd : ready) {
    if (fd == memory_.doorbell() ||
        (network_ != nullptr && fd == network_->descriptor())) {
      continue;
    }
    const auto mate =
        std::find_if(mates_.begin(), mates_.end(), [fd](const auto& it) {
          return it->socket() == fd;
        });
    if (mate != mates_.end()) {
      mateGone(**mate);
      continue;
    }
    std::unique_ptr<Mate> met = memory_.handle(fd);
    if (met != nullptr) {
      addMate(std::move(met));
    }
    watchNew();
  }
}

void Engine::addMate(std::unique_ptr<Mate> mate) {
  watch(mate->socket());
  const auto peer = peers_.find(mate->description().process);
  if (peer != peers_.end() && peer->second->mate == nullptr) {
    peer->second->mate = mate.get();
  }
  mates_.push_back(std::move(mate));
  driverFree_.notify_all();
}

void Engine::mateGone(Mate& mate) {
  // Its goodbye may still lie in the mailbox.
  while (drain(mate)) {
  }
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, mate.socket(), nullptr);
  const uint64_t process = mate.description().process;
  const auto found =
      std::find_if(mates_.begin(), mates_.end(), [&](const auto& it) {
        return it.get() == &mate;
      });
  // What it has put into node memory stays readable while it is mapped.
  goneMates_.push_back(std::move(*found));
  mates_.erase(found);
  const auto peer = peers_.find(process);
  if (peer != peers_.end()) {
    failPeer(*peer->second, "its process has ended");
  }
}

bool Engine::drainMailboxes() {
  bool worked = false;
  // By index: handling a message may add mates.
  for (size_t i = 0; i < mates_.size(); ++i) {
    worked = drain(*mates_[i]) || worked;
  }
  return worked;
}

bool Engine::drain(Mate& mate) {
  int count = 0;
  while (count < kMessagesPerMailbox) {
    const auto message = mate.inbox().front();
    if (!message.has_value()) {
      break;
    }
    dispatch(
        message->first(std::min(message->size(), sizeof(Record))),
        message->subspan(std::min(message->size(), sizeof(Record))),
        &mate);
    mate.inbox().pop();
    count += 1;
  }
  if (count > 0 && mate.inbox().takeRoomRequest()) {
    mate.wake();
  }
  return count > 0;
}

void Engine::messageArrived(
    std::span<const std::byte> header, std::span<const std::byte> payload) {
  dispatch(header, payload, nullptr);
}

void Engine::dispatch(
    std::span<const std::byte> header,
    std::span<const std::byte> payload,
    const Mate* fromMate) {
  Record record;
  try {
    record = parseRecord(header);
  } catch (const TransportError& error) {
    log(LogLevel::kWarn, concat("dropped a message: ", error.what()));
    return;
  }
  const auto found = groups_.find(record.group);
  if (found == groups_.end()) {
    keepEarly(record, header, payload, fromMate);
    return;
  }
  const std::shared_ptr<Group> group = found->second;
  try {
    group->handle(record, payload, fromMate);
  } catch (const Error& error) {
    group->fail(
        FailureKind::kTransport,
        concat("message from rank ", record.source, ": ", error.what()));
  }
}

void Engine::keepEarly(
    const Record& record,
    std::span<const std::byte> header,
    std::span<const std::byte> payload,
    const Mate* fromMate) {
  if (endedGroups_.contains(record.group)) {
    return;
  }
  if (earlyBytes_ + payload.size() > kEarlyBytes) {
    log(LogLevel::kWarn, "dropped a message of a group that is not known");
    return;
  }
  Early early;
  early.fromMate = fromMate;
  early.message.append(
      reinterpret_cast<const char*>(header.data()), header.size());
  early.message.append(
      reinterpret_cast<const char*>(payload.data()), payload.size());
  earlyBytes_ += early.message.size();
  early_[record.group].push_back(std::move(early));
}

// ---- failures ----

void Engine::processUnreachable(uint64_t process, const std::string& cause) {
  suspects_.push_back({process, cause, Clock::now()});
}

void Engine::checkSuspects(Clock::time_point now) {
  const auto ripe = std::partition(
      suspects_.begin(), suspects_.end(), [&](const Suspect& it) {
        return now - it.since < kGoodbyeGrace;
      });
  const std::vector<Suspect> gone(ripe, suspects_.end());
  suspects_.erase(ripe, suspects_.end());
  for (const Suspect& it : gone) {
    const auto peer = peers_.find(it.process);
    if (peer != peers_.end()) {
      failPeer(*peer->second, concat("the connection to it broke: ", it.cause));
    }
  }
}

void Engine::failPeer(Peer& peer, const std::string& cause) {
  const auto groups = groups_;
  for (const auto& [id, group] : groups) {
    group->peerGone(peer, cause);
  }
}

void Engine::housekeeping() {
  memory_.collect();
  const auto now = Clock::now();
  if (now - lastHousekeeping_ < kHousekeeping) {
    return;
  }
  lastHousekeeping_ = now;
  if (!suspects_.empty()) {
    checkSuspects(now);
  }
  for (auto it = groups_.begin(); it != groups_.end();) {
    const std::shared_ptr<Group> group = it->second;
    group->checkDeadlines(now);
    if (group->over()) {
      endedGroups_.insert(group->id());
      it = groups_.erase(it);
    } else {
      ++it;
    }
  }
  if (groups_.empty()) {
    goneMates_.clear();
  }
}

// ---- discovery ----

bool Engine::meet(
    uint64_t process, const std::string& address, Clock::time_point deadline) {
  const std::lock_guard meeting(meetMutex_);
  {
    const Lock lock(mutex_);
    if (findMate(process) != nullptr) {
      return true;
    }
  }
  std::unique_ptr<Mate> mate = memory_.connect(process, address, deadline);
  if (mate == nullptr) {
    return false;
  }
  const Lock lock(mutex_);
  addMate(std::move(mate));
  kick();
  return true;
}

bool Engine::awaitMate(uint64_t process, Clock::time_point deadline) {
  Lock lock(mutex_);
  while (findMate(process) == nullptr) {
    if (Clock::now() > deadline) {
      return false;
    }
    driverFree_.wait_for(lock, milliseconds(20));
  }
  return true;
}

Mate* Engine::findMate(uint64_t process) {
  for (const auto& mate : mates_) {
    if (mate->description().process == process) {
      return mate.get();
    }
  }
  return nullptr;
}

std::string Engine::networkAddress() {
  const Lock lock(mutex_);
  if (network_ == nullptr) {
    network_ = std::make_unique<Network>(
        config_, static_cast<NetworkListener&>(*this));
    transfers_.setNetwork(network_.get());
    watch(network_->descriptor());
    if (asleep_) {
      memory_.ring();  // so that the next sleep arms it
    }
  }
  return network_->address();
}

Peer* Engine::addPeer(
    uint64_t process,
    const std::string& host,
    int64_t pid,
    const std::string& networkAddress) {
  const Lock lock(mutex_);
  std::unique_ptr<Peer>& peer = peers_[process];
  if (peer == nullptr) {
    peer = std::make_unique<Peer>(process, host, pid, config_);
  }
  peer->mate = findMate(process);
  if (!networkAddress.empty() && network_ != nullptr) {
    network_->addProcess(process, networkAddress);
  }
  return peer.get();
}

std::shared_ptr<Group> Engine::addGroup(Membership membership) {
  const Lock lock(mutex_);
  checkUsable();
  auto group = std::make_shared<Group>(*this, std::move(membership));
  groups_.emplace(group->id(), group);
  const auto early = early_.find(group->id());
  if (early != early_.end()) {
    const std::vector<Early> messages = std::move(early->second);
    early_.erase(early);
    for (const Early& it : messages) {
      earlyBytes_ -= it.message.size();
      const auto bytes = std::as_bytes(std::span(it.message));
      dispatch(
          bytes.first(sizeof(Record)),
          bytes.subspan(sizeof(Record)),
          it.fromMate);
    }
  }
  return group;
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
    for (const auto& [id, group] : groups_) {
      groups.push_back(group);
    }
  }
  for (const auto& group : groups) {
    group->leave(
        std::chrono::duration_cast<milliseconds>(deadline - Clock::now()));
  }
  Lock lock(mutex_);
  const auto needed = [&] {
    return std::any_of(groups.begin(), groups.end(), [](const auto& it) {
      return !it->over();
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
