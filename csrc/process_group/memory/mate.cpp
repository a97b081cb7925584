// SPDX-License-Identifier: Apache-2.0
#include "process_group/memory/mate.hpp"

#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"

namespace automoe {

namespace {

FileDescriptor openProcess(pid_t pid) {
  return FileDescriptor(
      pid > 0 ? static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)) : -1);
}

}  // namespace

bool readProcessMemory(
    pid_t pid, uint64_t address, std::byte* to, size_t bytes) {
  while (bytes > 0) {
    iovec local = {to, bytes};
    iovec remote = {reinterpret_cast<void*>(address), bytes};
    const ssize_t got = ::process_vm_readv(pid, &local, 1, &remote, 1, 0);
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got <= 0) {
      return false;
    }
    to += got;
    address += static_cast<uint64_t>(got);
    bytes -= static_cast<size_t>(got);
  }
  return true;
}

Mate::Mate(
    MateDescription description,
    Segment segment,
    Ring inbox,
    std::shared_ptr<const void> inboxOwner,
    Ring outbox,
    FileDescriptor socket,
    FileDescriptor doorbell)
    : description_(description),
      segment_(std::move(segment)),
      inboxOwner_(std::move(inboxOwner)),
      inbox_(inbox),
      outbox_(outbox),
      socket_(std::move(socket)),
      processDescriptor_(openProcess(description.pid)),
      doorbell_(std::move(doorbell)) {}

void Mate::post(
    std::span<const std::byte> record, std::span<const std::byte> payload) {
  if (waiting_.empty() && outbox_.tryPush(record, payload)) {
    wake();
    return;
  }
  std::string& message = waiting_.emplace_back();
  message.reserve(record.size() + payload.size());
  message.append(reinterpret_cast<const char*>(record.data()), record.size());
  message.append(reinterpret_cast<const char*>(payload.data()), payload.size());
  flush();
}

bool Mate::flush() {
  bool moved = false;
  while (!waiting_.empty()) {
    const auto message = std::as_bytes(std::span(waiting_.front()));
    if (!outbox_.tryPush(message, {})) {
      outbox_.requestRoom();
      // The reader may have made room before it could see the request.
      if (!outbox_.tryPush(message, {})) {
        break;
      }
    }
    waiting_.pop_front();
    moved = true;
  }
  if (moved) {
    wake();
  }
  return moved;
}

void Mate::wake() {
  auto& sleeping = segment_.header().sleeping;
  if (sleeping.load(std::memory_order_seq_cst) != 0 &&
      sleeping.exchange(0) != 0) {
    const uint64_t one = 1;
    (void)!::write(doorbell_.get(), &one, sizeof(one));
  }
}

void Mate::read(uint64_t address, std::byte* to, size_t bytes) const {
  if (!readProcessMemory(description_.pid, address, to, bytes)) {
    throw TransportError(concat(
        "cannot read ",
        bytes,
        " bytes of process ",
        description_.pid,
        ": ",
        strerror(errno)));
  }
}

}  // namespace automoe
