// SPDX-License-Identifier: Apache-2.0
// Memory on the devices of a node that its ranks read from each other.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "process_group/device/device.hpp"
#include "process_group/exchange/device_flags.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {

/// Memory of one device that only grows. What it was before stays allocated,
/// for work that is under way.
class DeviceBuffer {
 public:
  enum class Use { kOwn, kShared };  // shared: Device::exportMemory() takes it

  explicit DeviceBuffer(Device& device, Use use = Use::kOwn)
      : device_(device), use_(use) {}
  ~DeviceBuffer();
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  /// At least so many bytes; what was in it is lost when it grows.
  std::byte* atLeast(size_t bytes);
  /// Never frees what it has: others may have it open, or work use it.
  void keepForEver() { memory_.clear(); }

 private:
  Device& device_;
  const Use use_;
  std::vector<std::byte*> memory_;  // the last one is in use
  size_t bytes_ = 0;
};

/// What one group has of it. Every rank has two arenas, which it writes in turn
/// for its node-mates to read, and for each arena a row of flags: *the mate's
/// arena is ready*.
///
/// Mostly no flag says that an arena has been read: a rank writes it again in
/// the call after the next, and in the next one it waits for all mates, whose
/// streams have read before they say that they are ready. A call that may not
/// follow another one in that way, as in a graph that is replayed, begins and
/// ends with fence().
///
/// All ranks of a node make the same calls in the same order. Memory that a
/// mate may have open is not freed: not before leave(), and never if that has
/// failed. Not thread-safe, but for what ends waits.
class DeviceMemory {
 public:
  /// By which node-mates find the own arenas, and the flags.
  struct Offer {
    Device::Handle arenas;
    uint64_t flags = 0;  // of the rank with local rank 0
  };

  DeviceMemory(Engine& engine, Group& group, Device& device);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  /// Makes what is the own. Throws DeviceError or TransportError.
  Offer offer();
  /// Opens what the ranks of the node have offered, all of them, by local
  /// rank. Throws the same.
  void open(std::span<const Offer> offers);
  /// Enqueues what tells whether the device can use flags.
  void tryFlags(Device::Stream stream);

  /// Begins a call in which the rank with local rank l needs needs[l] bytes; a
  /// rank whose arena has to grow tells its mates where the new one is, for
  /// which they block.
  void begin(std::span<const size_t> needs, std::chrono::milliseconds timeout);
  /// The arena of a local rank in this call.
  std::byte* arena(size_t localRank) const;

  /// When no work uses it any more: closes what mates have, and waits until
  /// they have closed what is the own, at most `timeout`. Throws TimeoutError
  /// then, and the failure of the group, which a mate that is late does not
  /// cause.
  void leave(std::chrono::milliseconds timeout);

  // Enqueue; nothing where there are no node-mates.

  /// The own arena is written; the mates may read it.
  void setReady(Device::Stream stream);
  /// All mates have said so of theirs.
  void awaitReady(Device::Stream stream);
  /// All mates have come this far: they have read the own arena, and this rank
  /// theirs. The two have flags of their own, as the end of one call and the
  /// beginning of the next have nothing between them.
  enum class Fence : size_t { kBegin = 0, kEnd = 1 };
  void fence(Device::Stream stream, Fence which);

  /// Nothing is freed: the device may use it for ever.
  void keepForEver() { kept_ = true; }

  /// Ends all waits of this rank's streams that there are now.
  void releaseWaits() noexcept;
  /// Ends those for mates that leave; a rank whose flag a stream has waited for
  /// in vain. To be called by one thread, again and again.
  std::optional<int> releaseWaitsForGone() noexcept;

 private:
  static constexpr size_t kArenas = 2;

  struct Mate {
    int rank = 0;  // in the group
    std::byte* arena = nullptr;
    std::vector<std::byte*> opened;
  };

  /// A row of flags for each arena, and for each fence.
  DeviceFlags::Shape flagsShape() const {
    return {kArenas + 2, mates_.size(), self_};
  }
  template <typename See>
  void forEachMate(const See& see);
  void closeAll() noexcept;
  using Handles = std::vector<Device::Handle>;  // by local rank
  /// Sends `own` to all mates if there is one, receives from those of `from`.
  void exchangeHandles(
      const Device::Handle* own,
      std::span<const size_t> from,
      Handles& received,
      std::chrono::milliseconds timeout);

  Engine& engine_;
  Group& group_;
  Device& device_;
  const size_t self_;
  std::vector<Mate> mates_;         // by local rank; one is this rank itself
  std::vector<size_t> capacities_;  // bytes of each arena, by local rank
  DeviceBuffer arenas_;
  std::optional<NodePages> ownPages_;  // for flags, until they are there
  NodePages::Extent extent_;           // of the rank with local rank 0
  std::optional<DeviceFlags> flags_;   // none where there are no node-mates
  size_t which_ = kArenas - 1;
  bool opened_ = false;  // mates may have what is the own open
  bool left_ = false;
  bool kept_ = false;
};

}  // namespace automoe
