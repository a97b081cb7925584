// SPDX-License-Identifier: Apache-2.0
#include "process_group/memory/node_memory.hpp"

#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"
#include "process_group/memory/handshake.hpp"

namespace automoe {
namespace {

constexpr size_t kRingCapacity = size_t{64} * 1024;
// In front of every shared extent: how many mates still read it.
constexpr size_t kExtentHeader = ExtentAllocator::kAlignment;

// Yama's mode 1 lets only ancestors read a process; this opens ours to the
// other ranks, which run as the same user.
void allowCrossMemoryReads() {
  std::ifstream file("/proc/sys/kernel/yama/ptrace_scope");
  int scope = 0;
  if (file >> scope && scope == 1) {
    ::prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
  }
}

std::atomic<uint32_t>& readerCount(const Segment& segment, uint64_t offset) {
  std::byte* place = segment.at(offset - kExtentHeader, kExtentHeader);
  if (offset % kExtentHeader != 0) {
    throw TransportError(concat("no extent begins at ", offset));
  }
  return *reinterpret_cast<std::atomic<uint32_t>*>(place);
}

}  // namespace

/// A handshake that another process began.
struct NodeMemory::Handshake {
  FileDescriptor socket;
  std::optional<OpenedMate> mate;  // after its hello
  std::shared_ptr<const uint64_t> ring;
};

NodeMemory::NodeMemory(uint64_t process, const Config& config)
    : process_(process),
      crossMemory_(config.crossMemory),
      rates_(measureCopyRates()),
      segment_(Segment::create(process, config.nodeMemoryBytes)),
      doorbell_(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)),
      extents_(Segment::kHeaderBytes, config.nodeMemoryBytes) {
  AUTOMOE_CHECK(doorbell_.valid(), "eventfd: ", strerror(errno));
  if (readsDirectly()) {
    allowCrossMemoryReads();
  }
  address_ = concat("automoe-", std::hex, process);
  listener_ = listenAt(address_);
}

NodeMemory::~NodeMemory() {
  handshakes_.clear();  // gives mailboxes back to extents_
}

bool NodeMemory::readsDirectly() const {
  return crossMemory_ == CrossMemory::kAlways ||
         (crossMemory_ == CrossMemory::kMeasured && rates_.preferCrossMemory());
}

std::shared_ptr<const uint64_t> NodeMemory::allocateRing() {
  const std::lock_guard lock(extentsMutex_);
  const auto offset = extents_.allocate(Ring::kHeaderBytes + kRingCapacity);
  AUTOMOE_CHECK(offset.has_value(), "node memory is full: no mailbox fits");
  std::memset(segment_.at(*offset, Ring::kHeaderBytes), 0, Ring::kHeaderBytes);
  return {new uint64_t(*offset), [this](const uint64_t* ring) {
            const std::lock_guard lock(extentsMutex_);
            extents_.release(*ring);
            delete ring;
          }};
}

Ring NodeMemory::inbox(uint64_t ring) const {
  return Ring(
      segment_.at(ring, Ring::kHeaderBytes + kRingCapacity), kRingCapacity);
}

std::unique_ptr<Mate> NodeMemory::connect(
    uint64_t process, const std::string& address, Deadline deadline) {
  FileDescriptor socket = connectTo(address, deadline);
  if (!socket.valid()) {
    return nullptr;
  }
  const auto ring = allocateRing();
  Hello hello = makeHello(process_, segment_, *ring, kRingCapacity);
  sendHello(socket.get(), hello, segment_.fd(), doorbell_.get());
  OpenedMate mate = receiveHello(socket.get(), readsDirectly());
  if (mate.hello.process != process) {
    throw TransportError("another process answers at a node-mate's address");
  }
  if (mate.hello.proofRead != segment_.header().proof) {
    throw TransportError("a node-mate could not read our memory");
  }
  hello.proofRead = mate.segment->header().proof;
  hello.readsDirectly = mate.readable ? 1 : 0;
  sendHello(socket.get(), hello, -1, -1);
  return mate.intoMate(inbox(*ring), ring, std::move(socket));
}

std::vector<int> NodeMemory::descriptors() const {
  std::vector<int> fds = {doorbell_.get(), listener_.get()};
  for (const auto& [fd, handshake] : handshakes_) {
    fds.push_back(fd);
  }
  return fds;
}

std::unique_ptr<Mate> NodeMemory::handle(int fd) {
  if (fd == listener_.get()) {
    FileDescriptor socket = acceptFrom(listener_.get());
    if (socket.valid()) {
      auto handshake = std::make_unique<Handshake>();
      const int accepted = socket.get();
      handshake->socket = std::move(socket);
      handshakes_.emplace(accepted, std::move(handshake));
    }
    return nullptr;
  }
  const auto found = handshakes_.find(fd);
  if (found == handshakes_.end()) {
    return nullptr;
  }
  try {
    std::unique_ptr<Mate> mate = finish(*found->second);
    if (mate != nullptr) {
      handshakes_.erase(found);
    }
    return mate;
  } catch (const std::exception& error) {
    log(LogLevel::kInfo, concat("dropped a handshake: ", error.what()));
    handshakes_.erase(found);
    return nullptr;
  }
}

std::unique_ptr<Mate> NodeMemory::finish(Handshake& handshake) {
  const int fd = handshake.socket.get();
  if (!handshake.mate.has_value()) {
    handshake.mate = receiveHello(fd, readsDirectly());
    handshake.ring = allocateRing();
    Hello answer =
        makeHello(process_, segment_, *handshake.ring, kRingCapacity);
    answer.proofRead = handshake.mate->segment->header().proof;
    answer.readsDirectly = handshake.mate->readable ? 1 : 0;
    sendHello(fd, answer, segment_.fd(), doorbell_.get());
    return nullptr;
  }
  const Hello last = receiveConfirmation(fd);
  if (last.proofRead != segment_.header().proof) {
    throw TransportError("a node-mate could not read our memory");
  }
  handshake.mate->hello.readsDirectly = last.readsDirectly;
  return handshake.mate->intoMate(
      inbox(*handshake.ring), handshake.ring, std::move(handshake.socket));
}

std::optional<NodeMemory::Extent> NodeMemory::allocate(
    size_t bytes, uint32_t readers) {
  const std::lock_guard lock(extentsMutex_);
  if (bytes > segment_.bytes()) {
    return std::nullopt;
  }
  const auto offset = extents_.allocate(bytes + kExtentHeader);
  if (!offset.has_value()) {
    return std::nullopt;
  }
  const uint64_t data = *offset + kExtentHeader;
  readerCount(segment_, data).store(readers);
  shared_.push_back(data);
  return Extent{data, segment_.at(data, bytes)};
}

uint32_t NodeMemory::readers(const Segment& segment, uint64_t offset) {
  return readerCount(segment, offset).load(std::memory_order_seq_cst);
}

void NodeMemory::addReader(const Segment& segment, uint64_t offset) {
  readerCount(segment, offset).fetch_add(1, std::memory_order_acq_rel);
}

void NodeMemory::doneReading(const Segment& segment, uint64_t offset) {
  readerCount(segment, offset).fetch_sub(1, std::memory_order_seq_cst);
}

size_t NodeMemory::collect() {
  const std::lock_guard lock(extentsMutex_);
  const auto unused =
      std::partition(shared_.begin(), shared_.end(), [&](uint64_t offset) {
        return readers(segment_, offset) != 0;
      });
  const auto freed = static_cast<size_t>(shared_.end() - unused);
  for (auto it = unused; it != shared_.end(); ++it) {
    extents_.release(*it - kExtentHeader);
  }
  shared_.erase(unused, shared_.end());
  return freed;
}

size_t NodeMemory::allocatedBytes() const {
  const std::lock_guard lock(extentsMutex_);
  return extents_.allocatedBytes();
}

void NodeMemory::ring() const {
  const uint64_t one = 1;
  (void)!::write(doorbell_.get(), &one, sizeof(one));
}

void NodeMemory::prepareToSleep() const {
  segment_.header().sleeping.store(1, std::memory_order_seq_cst);
}

void NodeMemory::wokeUp() const {
  segment_.header().sleeping.store(0, std::memory_order_seq_cst);
  uint64_t count;
  (void)!::read(doorbell_.get(), &count, sizeof(count));
}

}  // namespace automoe
