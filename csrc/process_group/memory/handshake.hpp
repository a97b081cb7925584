// SPDX-License-Identifier: Apache-2.0
// The messages and descriptors by which two processes of a node meet.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "process_group/common/file_descriptor.hpp"
#include "process_group/memory/mate.hpp"

namespace automoe {

/// First and second message carry a memfd and an eventfd; the third only
/// confirms. Fixed layout, little-endian.
struct Hello {
  static constexpr uint64_t kMagic = 0x6f6c6c65682d6f61;
  uint64_t magic;
  uint64_t process;
  uint64_t segmentBytes;
  uint64_t ringOffset;  // in the sender's segment: where the receiver writes
  uint64_t ringBytes;
  uint64_t probeAddress;   // of the proof, in the sender's address space
  uint64_t proofRead;      // what stands in the receiver's segment
  uint64_t readsDirectly;  // 1: the sender can read the receiver's memory
};

/// What the other side's hello opened.
struct OpenedMate {
  Hello hello;
  std::unique_ptr<Segment> segment;
  FileDescriptor doorbell;
  pid_t pid = 0;
  bool readable = false;

  /// `inboxOwner` keeps the inbox's place in the own segment.
  std::unique_ptr<Mate> intoMate(
      Ring inbox,
      std::shared_ptr<const void> inboxOwner,
      FileDescriptor socket);
};

/// A listening abstract socket; gone with the process.
FileDescriptor listenAt(const std::string& address);
/// Invalid when nobody listens at `address` in this network namespace.
FileDescriptor connectTo(
    const std::string& address, std::chrono::steady_clock::time_point deadline);
/// Invalid when the other side belongs to another user or is gone.
FileDescriptor acceptFrom(int listener);

Hello makeHello(
    uint64_t process, const Segment& segment, uint64_t ring, size_t ringBytes);
/// Sends a hello with two descriptors, or with none (-1).
void sendHello(int socket, const Hello& hello, int memory, int doorbell);
/// Receives a hello with its descriptors and maps the memory; probes whether
/// tensors of that process can be read directly, if they are to be. Throws
/// TransportError.
OpenedMate receiveHello(int socket, bool probeCrossMemory);
/// Receives a hello without descriptors. Throws TransportError.
Hello receiveConfirmation(int socket);

}  // namespace automoe
