// SPDX-License-Identifier: Apache-2.0
#include "process_group/memory/handshake.hpp"

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <utility>
#include <vector>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

struct Name {
  sockaddr_un address = {};
  socklen_t length = 0;
};

// An abstract name (it begins with a zero byte) belongs to the network
// namespace and leaves nothing in any file system.
Name abstractName(const std::string& text) {
  Name name;
  AUTOMOE_CHECK(text.size() + 1 < sizeof(name.address.sun_path), text);
  name.address.sun_family = AF_UNIX;
  std::memcpy(name.address.sun_path + 1, text.data(), text.size());
  name.length =
      static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  return name;
}

FileDescriptor makeSocket() {
  FileDescriptor socket(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  if (!socket.valid()) {
    throw TransportError(concat("unix socket: ", strerror(errno)));
  }
  return socket;
}

void setTimeouts(int socket, std::chrono::milliseconds timeout) {
  const auto ms = std::max<int64_t>(timeout.count(), 1);
  timeval value = {ms / 1000, (ms % 1000) * 1000};
  ::setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &value, sizeof(value));
  ::setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &value, sizeof(value));
}

ucred credentials(int socket) {
  ucred peer = {};
  socklen_t size = sizeof(peer);
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
    throw TransportError(concat("SO_PEERCRED: ", strerror(errno)));
  }
  return peer;
}

struct Received {
  Hello hello;
  std::vector<FileDescriptor> descriptors;
};

// Takes whatever descriptors came, so that none stays open by accident.
std::vector<FileDescriptor> takeDescriptors(msghdr& message) {
  std::vector<FileDescriptor> taken;
  for (cmsghdr* head = CMSG_FIRSTHDR(&message); head != nullptr;
       head = CMSG_NXTHDR(&message, head)) {
    if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    const size_t count = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd;
      std::memcpy(&fd, CMSG_DATA(head) + i * sizeof(int), sizeof(int));
      taken.emplace_back(fd);
    }
  }
  return taken;
}

Received receive(int socket, size_t numDescriptors) {
  Received received;
  iovec data = {&received.hello, sizeof(Hello)};
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  ssize_t got;
  do {
    got = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  } while (got < 0 && errno == EINTR);
  const int error = errno;
  if (got >= 0) {
    received.descriptors = takeDescriptors(message);
  }
  if (got != static_cast<ssize_t>(sizeof(Hello)) ||
      (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0 ||
      received.hello.magic != Hello::kMagic ||
      received.descriptors.size() != numDescriptors) {
    throw TransportError(concat(
        "expected a hello of a node-mate with ",
        numDescriptors,
        " descriptors, got ",
        got,
        " bytes with ",
        received.descriptors.size(),
        got < 0 ? concat(" (", strerror(error), ")") : ""));
  }
  return received;
}

bool canRead(pid_t pid, uint64_t address, uint64_t expected) {
  uint64_t value = 0;
  return pid > 0 &&
         readProcessMemory(
             pid,
             address,
             reinterpret_cast<std::byte*>(&value),
             sizeof(value)) &&
         value == expected;
}

}  // namespace

std::unique_ptr<Mate> OpenedMate::intoMate(
    Ring inbox, std::shared_ptr<const void> inboxOwner, FileDescriptor socket) {
  std::byte* memory =
      segment->at(hello.ringOffset, Ring::kHeaderBytes + hello.ringBytes);
  MateDescription description;
  description.process = hello.process;
  description.pid = pid;
  description.readable = readable;
  description.readsUs = hello.readsDirectly == 1;
  return std::make_unique<Mate>(
      description,
      std::move(*segment),
      inbox,
      std::move(inboxOwner),
      Ring(memory, hello.ringBytes),
      std::move(socket),
      std::move(doorbell));
}

FileDescriptor listenAt(const std::string& address) {
  FileDescriptor socket = makeSocket();
  const Name name = abstractName(address);
  const auto* raw = reinterpret_cast<const sockaddr*>(&name.address);
  if (::bind(socket.get(), raw, name.length) != 0 ||
      ::listen(socket.get(), 1024) != 0) {
    throw TransportError(
        concat("cannot listen at @", address, ": ", strerror(errno)));
  }
  return socket;
}

FileDescriptor connectTo(
    const std::string& address,
    std::chrono::steady_clock::time_point deadline) {
  FileDescriptor socket = makeSocket();
  const Name name = abstractName(address);
  const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(
      deadline - std::chrono::steady_clock::now());
  setTimeouts(socket.get(), left);
  const auto* raw = reinterpret_cast<const sockaddr*>(&name.address);
  if (::connect(socket.get(), raw, name.length) != 0) {
    if (errno == ECONNREFUSED || errno == ENOENT) {
      return {};
    }
    throw TransportError(
        concat("cannot connect to @", address, ": ", strerror(errno)));
  }
  if (credentials(socket.get()).uid != ::geteuid()) {
    throw TransportError(
        concat("@", address, " is held by another user of this machine"));
  }
  return socket;
}

FileDescriptor acceptFrom(int listener) {
  FileDescriptor socket(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
  if (!socket.valid() || credentials(socket.get()).uid != ::geteuid()) {
    return {};
  }
  // The engine only reads when something is there; a half message that never
  // ends must still not hold it.
  setTimeouts(socket.get(), std::chrono::seconds(1));
  return socket;
}

Hello makeHello(
    uint64_t process, const Segment& segment, uint64_t ring, size_t ringBytes) {
  Hello hello = {};
  hello.magic = Hello::kMagic;
  hello.process = process;
  hello.segmentBytes = segment.bytes();
  hello.ringOffset = ring;
  hello.ringBytes = ringBytes;
  hello.probeAddress = reinterpret_cast<uint64_t>(&segment.header().proof);
  return hello;
}

void sendHello(int socket, const Hello& hello, int memory, int doorbell) {
  iovec data = {const_cast<Hello*>(&hello), sizeof(hello)};
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  if (memory >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(2 * sizeof(int));
    const int fds[2] = {memory, doorbell};
    std::memcpy(CMSG_DATA(head), fds, sizeof(fds));
  }
  if (::sendmsg(socket, &message, MSG_NOSIGNAL) !=
      static_cast<ssize_t>(sizeof(hello))) {
    throw TransportError(concat("hello to a node-mate: ", strerror(errno)));
  }
}

OpenedMate receiveHello(int socket, bool probeCrossMemory) {
  Received received = receive(socket, 2);
  OpenedMate mate;
  mate.hello = received.hello;
  const Hello& hello = mate.hello;
  if (hello.ringBytes < 1024 || hello.ringBytes > (uint64_t{1} << 30) ||
      !std::has_single_bit(hello.ringBytes) || hello.ringOffset % 64 != 0 ||
      hello.ringOffset < Segment::kHeaderBytes) {
    throw TransportError(concat(
        "a node-mate offers a mailbox of ",
        hello.ringBytes,
        " bytes at ",
        hello.ringOffset));
  }
  mate.segment = std::make_unique<Segment>(Segment::attach(
      std::move(received.descriptors[0]), hello.process, hello.segmentBytes));
  mate.segment->at(hello.ringOffset, Ring::kHeaderBytes + hello.ringBytes);
  mate.doorbell = std::move(received.descriptors[1]);
  mate.pid = credentials(socket).pid;
  mate.readable =
      probeCrossMemory &&
      canRead(mate.pid, mate.hello.probeAddress, mate.segment->header().proof);
  return mate;
}

Hello receiveConfirmation(int socket) {
  return receive(socket, 0).hello;
}

}  // namespace automoe
