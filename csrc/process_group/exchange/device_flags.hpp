// SPDX-License-Identifier: Apache-2.0
// The flags by which streams of the ranks of a node take turns.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "process_group/device/device.hpp"
#include "process_group/memory/node_pages.hpp"

namespace automoe {

/// In each row a flag from every rank of the node to every other one. They lie
/// in page-locked memory of the host that all of them share: so a host can
/// end a wait by a store, however its device's queues are blocked.
///
/// Whoever waits for a flag clears it, so that a captured graph can be
/// replayed. Not thread-safe, but for what the host does.
class DeviceFlags {
 public:
  struct Shape {
    size_t rows = 0;
    size_t mates = 1;
    size_t self = 0;  // local rank
  };
  static size_t bytesFor(const Shape& shape);

  /// Throws DeviceError where the device cannot map the pages.
  DeviceFlags(Device& device, NodePages pages, const Shape& shape);
  /// No stream of this rank waits any more, unless keepForEver() was called.
  ~DeviceFlags();
  DeviceFlags(const DeviceFlags&) = delete;
  DeviceFlags& operator=(const DeviceFlags&) = delete;

  // Enqueue.

  /// Those of the row that the mates wait for.
  void set(Device::Stream stream, size_t row);
  /// Waits for the mates' of the row, and clears them.
  void await(Device::Stream stream, size_t row);
  /// Sets one, waits for it and clears it: whether the device can.
  void tryOwn(Device::Stream stream);

  /// By the host, at once: ends what this rank waits for. Thread-safe.
  void release() noexcept;
  /// Tells the mates, by the host, that this rank sets no flag any more: all
  /// work of its streams is done.
  void leave() noexcept;
  bool hasLeft(size_t mate) const noexcept;
  /// Sets by the host what this rank may still wait for from a mate that has
  /// left, once that one's own sets have been seen. True when a stream has
  /// taken one of those: it was not given what it waited for. For one thread.
  bool standInFor(size_t mate) noexcept;
  void keepForEver();

 private:
  size_t placeOf(size_t receiver, size_t row, size_t sender) const;
  std::atomic_ref<uint32_t> word(size_t place) const noexcept;

  Device& device_;
  NodePages pages_;
  const Shape shape_;
  uint32_t* mapped_ = nullptr;   // for the device
  std::vector<size_t> ownSets_;  // places that standInFor() has set
  bool kept_ = false;
};

}  // namespace automoe
