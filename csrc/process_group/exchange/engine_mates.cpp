// SPDX-License-Identifier: Apache-2.0
// The engine's part about other processes: how it meets them, what they post,
// and when they end.
#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"
#include "process_group/exchange/engine.hpp"

namespace automoe {
namespace {

using std::chrono::milliseconds;

constexpr int kMessagesPerMailbox = 64;

}  // namespace

// ---- discovery ----

bool Engine::meet(
    uint64_t process, const std::string& address, Clock::time_point deadline) {
  const std::lock_guard meeting(meetMutex_);
  {
    const Lock lock(mutex_);
    if (peers_.findMate(process) != nullptr) {
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
  while (peers_.findMate(process) == nullptr) {
    if (Clock::now() > deadline) {
      return false;
    }
    driverFree_.wait_for(lock, milliseconds(20));
  }
  return true;
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
  if (!networkAddress.empty() && network_ != nullptr) {
    network_->addProcess(process, networkAddress);
  }
  return &peers_.add(process, host, pid);
}

std::shared_ptr<Group> Engine::addGroup(Membership membership) {
  const Lock lock(mutex_);
  checkUsable();
  auto group = std::make_shared<Group>(*this, std::move(membership));
  groups_.add(group);
  // A mate may have ended since it met us.
  for (int rank : group->topology().ranksOf(group->topology().node())) {
    if (rank == group->topology().rank()) {
      continue;
    }
    Peer& peer = group->peer(rank);
    peer.mate = peers_.findMate(peer.process);
    if (peer.mate == nullptr) {
      group->peerGone(peer, "its process has ended");
    }
  }
  return group;
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

void Engine::handleEvent(int fd) {
  if (fd == memory_.doorbell() ||
      (network_ != nullptr && fd == network_->descriptor())) {
    return;  // progress() looks anyway
  }
  if (Mate* mate = peers_.mateAt(fd)) {
    mateGone(*mate, "its process has ended");
    return;
  }
  std::unique_ptr<Mate> met = memory_.handle(fd);
  if (met != nullptr) {
    addMate(std::move(met));
  }
  for (int next : memory_.descriptors()) {
    watch(next);
  }
}

void Engine::addMate(std::unique_ptr<Mate> mate) {
  watch(mate->socket());
  if (mate->processDescriptor() >= 0) {
    watch(mate->processDescriptor());
  }
  peers_.addMate(std::move(mate));
  driverFree_.notify_all();  // awaitMate()
}

void Engine::mateGone(Mate& mate, const std::string& cause) {
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, mate.socket(), nullptr);
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, mate.processDescriptor(), nullptr);
  try {
    // Its goodbye may still lie in the mailbox.
    while (drain(mate)) {
    }
  } catch (const TransportError& error) {
    log(LogLevel::kInfo, error.what());
  }
  const uint64_t process = mate.description().process;
  peers_.mateGone(mate);
  failPeer(process, cause);
}

bool Engine::drainMailboxes() {
  bool worked = false;
  // By index: what a message causes may add a mate, or take this one away.
  for (size_t i = 0; i < peers_.mates().size(); ++i) {
    Mate& mate = *peers_.mates()[i];
    try {
      worked = drain(mate) || worked;
    } catch (const TransportError& error) {
      mateGone(mate, error.what());
    }
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
    const size_t header = std::min(message->size(), sizeof(Record));
    groups_.deliver(message->first(header), message->subspan(header), &mate);
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
  groups_.deliver(header, payload, nullptr);
}

}  // namespace automoe
