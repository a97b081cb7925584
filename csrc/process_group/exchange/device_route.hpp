// SPDX-License-Identifier: Apache-2.0
// A plan in the memory of a device.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "kernels/plan_kernels.hpp"
#include "process_group/device/device.hpp"
#include "process_group/exchange/route_lists.hpp"
#include "process_group/exchange/route_words.hpp"

namespace automoe {

/// Memory for the lists of plans, of which a training step makes one for each
/// layer: allocating it anew would stop the device. All of it is used on one
/// stream. Thread-safe.
class DeviceListPool {
 public:
  struct Block {
    size_t bytes = 0;
    std::byte* device = nullptr;
    // Of a block that has a twin on the host; else null.
    std::byte* host = nullptr;       // page-locked
    Device::Event copied = nullptr;  // from one to the other
  };
  /// Waits on the host for work of the stream up to here.
  using HostWait = std::function<void()>;

  DeviceListPool(std::shared_ptr<Device> device, Device::Stream stream);
  ~DeviceListPool();
  DeviceListPool(const DeviceListPool&) = delete;
  DeviceListPool& operator=(const DeviceListPool&) = delete;

  /// A block with these words, copied by the stream.
  Block upload(std::span<const int32_t> words);
  /// The same while the stream is captured: there when this returns, and for
  /// every replay, for which the caller keeps it.
  Block uploadNow(std::span<const int32_t> words);
  /// A block for work of the stream to fill.
  Block take(size_t bytes);
  /// The same, with a twin on the host.
  Block takeWithTwin(size_t bytes);
  /// Lists of a block, one after the other, for which it waits. Throws what
  /// `wait` does.
  std::vector<int32_t> download(
      const Block& block,
      std::span<const RouteLists::List> lists,
      const HostWait& wait);
  /// Work on the stream may still use it; what comes later may get it.
  void giveBack(const Block& block);

 private:
  Block find(size_t bytes, bool withTwin);
  Block make(size_t bytes, bool withTwin);
  void free(const Block& block);

  const std::shared_ptr<Device> device_;
  const Device::Stream stream_;
  Device::Stream aside_ = nullptr;  // made at the first uploadNow()
  std::mutex mutex_;
  std::vector<Block> free_;
};

/// The lists of a route on a device, used by every call on the plan. Immutable,
/// once it is filled.
class DeviceRoute {
 public:
  /// What there is beside the lists where a device has made them.
  struct Planned {
    /// As far as the host knows: with a bound, rows are those that there may
    /// be, and -1 are dropped.
    RouteHeader header;
    kernels::PlanCounts at{kernels::PlanIds{}};  // of the counts
    DeviceListPool::Block counts;
    // The sections of the words of a route, without gaps.
    RouteLists::List tokens;
    RouteLists::List slotBegins;
    RouteLists::List slots;
    RouteLists::List entryBegins;
    RouteLists::List entries;
  };

  /// Copies lists that the host has made.
  DeviceRoute(
      std::shared_ptr<DeviceListPool> pool, RouteLists lists, bool captured);
  /// To be filled by a plan.
  explicit DeviceRoute(std::shared_ptr<DeviceListPool> pool);
  ~DeviceRoute();
  DeviceRoute(const DeviceRoute&) = delete;
  DeviceRoute& operator=(const DeviceRoute&) = delete;

  /// Once. `others` are kept as long as the lists; captured work reads them.
  void fill(
      RouteLists lists,
      DeviceListPool::Block block,
      Planned planned,
      std::vector<DeviceListPool::Block> others);

  const RouteLists& lists() const { return lists_; }
  /// A list on the device, from item `first` on.
  const int32_t* at(const RouteLists::List& list, size_t first = 0) const;

  /// Null where the host has made the lists, and has the words.
  const Planned* planned() const {
    return planned_.has_value() ? &*planned_ : nullptr;
  }
  /// What a tensor holds in place of the words of such a route:
  /// RouteHeader::kOnDevice, and the header's other fields.
  std::vector<int32_t> headerWords() const;
  const DeviceListPool::Block& block() const { return block_; }
  DeviceListPool& pool() const { return *pool_; }

 private:
  const std::shared_ptr<DeviceListPool> pool_;
  RouteLists lists_;  // without its words
  DeviceListPool::Block block_;
  std::optional<Planned> planned_;
  std::vector<DeviceListPool::Block> others_;
};

/// The counts of a route that a device has made.
std::vector<int32_t> readCounts(
    const DeviceRoute& route, const DeviceListPool::HostWait& wait);
/// With these its words, but for the fingerprint's those of RouteBuilder.
std::vector<int32_t> readWords(
    const DeviceRoute& route,
    const Topology& topology,
    std::span<const int32_t> counts,
    const DeviceListPool::HostWait& wait);
/// Where the receive rows of each own expert end.
std::vector<int32_t> offsetsOf(
    const DeviceRoute& route,
    const Topology& topology,
    std::span<const int32_t> counts);

}  // namespace automoe
