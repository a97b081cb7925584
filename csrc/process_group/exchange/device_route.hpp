// SPDX-License-Identifier: Apache-2.0
// A plan in the memory of a device.
#pragma once

#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "process_group/device/device.hpp"
#include "process_group/exchange/route_lists.hpp"

namespace automoe {

/// Memory for the lists of plans, of which a training step makes one for each
/// layer: allocating it anew would stop the device. All of it is used on one
/// stream. Thread-safe.
class DeviceListPool {
 public:
  struct Block {
    size_t bytes = 0;
    std::byte* device = nullptr;
    std::byte* host = nullptr;       // page-locked
    Device::Event copied = nullptr;  // from host to device
  };

  DeviceListPool(std::shared_ptr<Device> device, Device::Stream stream);
  ~DeviceListPool();
  DeviceListPool(const DeviceListPool&) = delete;
  DeviceListPool& operator=(const DeviceListPool&) = delete;

  /// A block with these words, copied by the stream.
  Block upload(std::span<const int32_t> words);
  /// Work on the stream may still use it; what comes later may get it.
  void giveBack(const Block& block);

 private:
  Block take(size_t bytes);
  void free(const Block& block);

  const std::shared_ptr<Device> device_;
  const Device::Stream stream_;
  std::mutex mutex_;
  std::vector<Block> free_;
};

/// The lists of a route, copied to a device once and used by every call on the
/// plan. Immutable.
class DeviceRoute {
 public:
  DeviceRoute(std::shared_ptr<DeviceListPool> pool, RouteLists lists);
  ~DeviceRoute();
  DeviceRoute(const DeviceRoute&) = delete;
  DeviceRoute& operator=(const DeviceRoute&) = delete;

  const RouteLists& lists() const { return lists_; }
  /// A list on the device, from item `first` on.
  const int32_t* at(const RouteLists::List& list, size_t first = 0) const;

 private:
  const std::shared_ptr<DeviceListPool> pool_;
  RouteLists lists_;  // without its words
  const DeviceListPool::Block block_;
};

}  // namespace automoe
