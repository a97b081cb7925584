// SPDX-License-Identifier: Apache-2.0
// What the exchange needs of an accelerator: memory that other processes of
// the node can map, streams, events and flags.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>

#include "kernels/device_kernels.hpp"
#include "process_group/common/error.hpp"

namespace automoe {

/// A call of the device's library failed; the text has the call and its cause.
class DeviceError : public Error {
 public:
  using Error::Error;
};

/// The device has no memory left for an allocation.
class DeviceFullError : public DeviceError {
 public:
  using DeviceError::DeviceError;
};

/// Work of a stream runs in the order in which it was enqueued; work of two
/// streams in any order that events and flags allow. Thread-safe. Methods
/// throw DeviceError; those that enqueue return at once.
class Device {
 public:
  using Stream = struct StreamTag*;
  using Event = struct EventTag*;

  virtual ~Device() = default;

  /// "NVIDIA H100 (0)", for texts.
  virtual std::string name() const = 0;

  // Memory.

  /// `hook` gives memory of the device back, such as what a cache of this
  /// process holds. It is called when the device is full, before allocate() is
  /// tried for a second time. To be set before other threads use the device.
  void setMemoryHook(std::function<void()> hook) {
    memoryHook_ = std::move(hook);
  }
  /// Aligned to 256 bytes. What is in it is not defined. Throws
  /// DeviceFullError where the device is full.
  virtual std::byte* allocate(size_t bytes) = 0;
  /// The same for memory that exportMemory() takes; a lot for each piece.
  virtual std::byte* allocateShared(size_t bytes) = 0;
  /// Waits until no work of the device uses it. Those who have opened it have
  /// closed it before.
  virtual void free(std::byte* memory) noexcept = 0;
  /// Page-locked memory of the host, which copy() takes as well.
  virtual std::byte* allocateHost(size_t bytes) = 0;
  virtual void freeHost(std::byte* memory) noexcept = 0;
  /// Makes whole pages of the host's memory, which other processes may have
  /// mapped too, memory for flags. Returns the address for the methods below.
  virtual std::byte* mapHost(std::byte* pages, size_t bytes) = 0;
  /// No work of the device uses them any more. `pages` as for mapHost().
  virtual void unmapHost(std::byte* pages) noexcept = 0;
  /// By which another rank of this node opens memory of allocateShared().
  struct Handle {
    std::array<std::byte, 128> bytes = {};
  };
  virtual Handle exportMemory(std::byte* memory) = 0;
  virtual std::byte* openMemory(const Handle& handle) = 0;
  virtual void closeMemory(std::byte* memory) noexcept = 0;

  // Streams and events.

  /// Of the highest priority: what it does is waited for by other ranks.
  virtual Stream makeStream() = 0;
  virtual void destroyStream(Stream stream) noexcept = 0;
  virtual Event makeEvent() = 0;
  virtual void destroyEvent(Event event) noexcept = 0;
  /// The event happens when what is on the stream by now is done; a later
  /// record replaces this one.
  virtual void record(Event event, Stream stream) = 0;
  /// What comes on the stream from now on begins after the event, as recorded
  /// by now. An event that was never recorded has happened.
  virtual void await(Stream stream, Event event) = 0;
  virtual bool happened(Event event) = 0;
  /// Whether what is enqueued is recorded into a graph, to run when that does.
  virtual bool isCapturing(Stream) { return false; }
  /// Blocks the host.
  virtual void synchronize(Stream stream) = 0;

  // Work.

  /// Between any two of: this device, one that is mapped, memory of
  /// allocateHost() (for other memory of the host, CUDA may block).
  virtual void copy(
      Stream stream, std::byte* to, const std::byte* from, size_t bytes) = 0;
  virtual void clear(Stream stream, std::byte* to, size_t bytes) = 0;
  /// Runs `launch` with what kernels::enqueue takes, so that its kernels are
  /// on the stream. `launch` may run later; it holds copies of what it needs.
  virtual void run(
      Stream stream, std::function<void(kernels::DeviceStream)> launch) = 0;

  // Flags: words that streams of two processes, and their hosts, meet at. They
  // are aligned to 4 bytes and begin as zero (the caller clears them). The
  // host writes them by atomic stores, which end waits whatever streams do.

  /// Writes the flags when what is on the stream by now is done; whoever sees
  /// one sees that work's writes too.
  virtual void setFlags(
      Stream stream, std::span<uint32_t* const> flags, uint32_t value) = 0;
  /// What comes on the stream from now on begins when each flag has had the
  /// value; a value that is overwritten before it is looked at is lost. Then
  /// the flag becomes `next`.
  virtual void awaitFlags(
      Stream stream,
      std::span<uint32_t* const> flags,
      uint32_t value,
      uint32_t next) = 0;
  void setFlag(Stream stream, uint32_t* flag, uint32_t value) {
    setFlags(stream, {&flag, 1}, value);
  }
  void awaitFlag(Stream stream, uint32_t* flag, uint32_t value) {
    awaitFlags(stream, {&flag, 1}, value, value);
  }

 protected:
  /// What `allocate` returns, called again after the hook if the device is
  /// full.
  template <typename Allocate>
  std::byte* allocateOrMakeRoom(const Allocate& allocate) const {
    try {
      return allocate();
    } catch (const DeviceFullError&) {
      if (!memoryHook_) {
        throw;
      }
    }
    memoryHook_();
    return allocate();
  }

 private:
  std::function<void()> memoryHook_;
};

/// Transfers between devices of different nodes.
class DeviceNetwork {
 public:
  struct Send {
    int peer;  // group rank
    const std::byte* data;
    size_t bytes;
  };
  struct Receive {
    int peer;
    std::byte* data;
    size_t bytes;
  };

  virtual ~DeviceNetwork() = default;

  /// Enqueues all of them as one group. Each peer enqueues the counterparts in
  /// its call of the same turn; those of one pair match in order, and are left
  /// out on both sides where they have no bytes.
  virtual void exchange(
      Device::Stream stream,
      std::span<const Send> sends,
      std::span<const Receive> receives) = 0;
  /// A graph has what was enqueued: neither the end nor abort() waits until it
  /// is gone.
  virtual void keepForGraphs() noexcept {}
  /// Ends what is under way, because a peer has failed; later calls throw.
  /// Thread-safe; does not block.
  virtual void abort() noexcept = 0;
  /// What went wrong, or nothing.
  virtual std::string failure() = 0;
};

}  // namespace automoe
