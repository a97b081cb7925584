// SPDX-License-Identifier: Apache-2.0
// One other process of this node: its memory, two mailboxes and its doorbell.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>

#include "process_group/common/file_descriptor.hpp"
#include "process_group/memory/ring.hpp"
#include "process_group/memory/segment.hpp"

namespace automoe {

/// What the handshake found out about a node-mate.
struct MateDescription {
  uint64_t process = 0;   // its id
  pid_t pid = 0;          // as seen from here; 0 when it cannot be seen
  bool readable = false;  // this process reads its tensors directly
  bool readsUs = false;   // it reads ours
};

/// Not thread-safe; the engine's lock guards it.
class Mate {
 public:
  Mate(
      MateDescription description,
      Segment segment,
      Ring inbox,
      std::shared_ptr<const void> inboxOwner,
      Ring outbox,
      FileDescriptor socket,
      FileDescriptor doorbell);

  const MateDescription& description() const { return description_; }
  const Segment& segment() const { return segment_; }
  Ring& inbox() { return inbox_; }
  /// End-of-file on this socket means that the process is gone.
  int socket() const { return socket_.get(); }
  /// Readable once the process has ended, even while children that it forked
  /// still hold its end of the socket; -1 where the process cannot be seen.
  int processDescriptor() const { return processDescriptor_.get(); }
  /// Most bytes of a record with its payload.
  size_t maxMessage() const { return outbox_.maxMessage(); }

  /// Puts a message into the mate's mailbox and wakes it if it sleeps. What
  /// does not fit waits here, in order, for flush().
  void post(
      std::span<const std::byte> record,
      std::span<const std::byte> payload = {});
  /// Moves waiting messages into the mailbox; true when any moved.
  bool flush();
  bool flushed() const { return waiting_.empty(); }
  /// Wakes the mate if it sleeps.
  void wake();

  /// Reads the mate's own memory with one copy; throws TransportError. Only
  /// when description().readable.
  void read(uint64_t address, std::byte* to, size_t bytes) const;

 private:
  MateDescription description_;
  Segment segment_;
  std::shared_ptr<const void> inboxOwner_;
  Ring inbox_;   // in our segment, the mate writes
  Ring outbox_;  // in the mate's segment, we write
  FileDescriptor socket_;
  FileDescriptor processDescriptor_;
  FileDescriptor doorbell_;
  std::deque<std::string> waiting_;
};

/// Reads another process's memory; false when the kernel does not allow it or
/// the range is not there.
bool readProcessMemory(
    pid_t pid, uint64_t address, std::byte* to, size_t bytes);

}  // namespace automoe
