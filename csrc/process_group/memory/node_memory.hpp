// SPDX-License-Identifier: Apache-2.0
// Memory that every process of a node can read, and who those processes are.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "process_group/common/config.hpp"
#include "process_group/memory/copy_rates.hpp"
#include "process_group/memory/extent_allocator.hpp"
#include "process_group/memory/mate.hpp"

namespace automoe {

/// The own segment, and the handshake over an abstract unix socket by which
/// two processes prove to each other that they share a node: each maps the
/// other's memory and says the random number that stands there. A third
/// process of the same host with other namespaces cannot.
///
/// connect() and the extents are thread-safe; the rest is guarded by the
/// engine's lock.
class NodeMemory {
 public:
  using Deadline = std::chrono::steady_clock::time_point;

  NodeMemory(uint64_t process, const Config& config);
  ~NodeMemory();
  NodeMemory(const NodeMemory&) = delete;
  NodeMemory& operator=(const NodeMemory&) = delete;

  /// Where other processes reach this one.
  const std::string& address() const { return address_; }
  /// Connects to a process that listens at `address`, and waits for its side
  /// of the handshake (its engine answers, whatever its user threads do).
  /// Nothing when nobody of this node listens there.
  std::unique_ptr<Mate> connect(
      uint64_t process, const std::string& address, Deadline deadline);

  /// Descriptors that ask for handle() when readable.
  std::vector<int> descriptors() const;
  /// Takes the next step of handshakes that others began on `fd`; a mate
  /// when one is complete. New descriptors may appear, others vanish.
  std::unique_ptr<Mate> handle(int fd);

  /// Memory of the own segment for `readers` mates: its offset and place.
  struct Extent {
    uint64_t offset;
    std::byte* data;
  };
  std::optional<Extent> allocate(size_t bytes, uint32_t readers);
  /// How many still read an extent of `segment`; one more; one less.
  static uint32_t readers(const Segment& segment, uint64_t offset);
  static void addReader(const Segment& segment, uint64_t offset);
  static void doneReading(const Segment& segment, uint64_t offset);
  /// Frees the extents that all readers are done with; how many.
  size_t collect();
  size_t allocatedBytes() const;

  /// Rings when a mate has posted something.
  int doorbell() const { return doorbell_.get(); }
  /// Rings the own doorbell, for a driver that sleeps.
  void ring() const;
  /// From here on mates ring; check the mailboxes once more before sleeping.
  void prepareToSleep() const;
  void wokeUp() const;

  const Segment& segment() const { return segment_; }
  const CopyRates& copyRates() const { return rates_; }

 private:
  struct Handshake;

  std::unique_ptr<Mate> finish(Handshake& handshake);
  /// A mailbox in the own segment; free again when nobody holds it.
  std::shared_ptr<const uint64_t> allocateRing();
  Ring inbox(uint64_t ring) const;
  bool readsDirectly() const;

  const uint64_t process_;
  const CrossMemory crossMemory_;
  const CopyRates rates_;
  Segment segment_;
  FileDescriptor doorbell_;
  FileDescriptor listener_;
  std::string address_;
  std::map<int, std::unique_ptr<Handshake>> handshakes_;

  mutable std::mutex extentsMutex_;
  ExtentAllocator extents_;
  std::vector<uint64_t> shared_;  // offsets of extents with readers
};

}  // namespace automoe
