// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_route.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

namespace automoe {
namespace {

constexpr size_t kSmallestBlock = size_t{1} << 16;

}  // namespace

DeviceListPool::DeviceListPool(
    std::shared_ptr<Device> device, Device::Stream stream)
    : device_(std::move(device)), stream_(stream) {}

DeviceListPool::~DeviceListPool() {
  for (const Block& block : free_) {
    free(block);
  }
}

DeviceListPool::Block DeviceListPool::upload(std::span<const int32_t> words) {
  const size_t bytes = words.size_bytes();
  Block block = take(bytes);
  try {
    if (bytes > 0) {
      std::memcpy(block.host, words.data(), bytes);
      device_->copy(stream_, block.device, block.host, bytes);
    }
    device_->record(block.copied, stream_);
  } catch (...) {
    giveBack(block);
    throw;
  }
  return block;
}

void DeviceListPool::giveBack(const Block& block) {
  const std::lock_guard lock(mutex_);
  free_.push_back(block);
}

DeviceListPool::Block DeviceListPool::take(size_t bytes) {
  {
    const std::lock_guard lock(mutex_);
    // What is on the device is used in the order of the stream; what is on the
    // host has to have been read.
    const auto it = std::ranges::find_if(free_, [&](const Block& block) {
      return block.bytes >= bytes && device_->happened(block.copied);
    });
    if (it != free_.end()) {
      const Block found = *it;
      free_.erase(it);
      return found;
    }
  }
  Block made;
  made.bytes = std::max(std::bit_ceil(bytes), kSmallestBlock);
  try {
    made.copied = device_->makeEvent();
    made.host = device_->allocateHost(made.bytes);
    made.device = device_->allocate(made.bytes);
  } catch (...) {
    free(made);
    throw;
  }
  return made;
}

void DeviceListPool::free(const Block& block) {
  if (block.device != nullptr) {
    device_->free(block.device);
  }
  if (block.host != nullptr) {
    device_->freeHost(block.host);
  }
  if (block.copied != nullptr) {
    device_->destroyEvent(block.copied);
  }
}

DeviceRoute::DeviceRoute(std::shared_ptr<DeviceListPool> pool, RouteLists lists)
    : pool_(std::move(pool)),
      lists_(std::move(lists)),
      block_(pool_->upload(lists_.words)) {
  lists_.words = {};
}

DeviceRoute::~DeviceRoute() {
  pool_->giveBack(block_);
}

const int32_t* DeviceRoute::at(
    const RouteLists::List& list, size_t first) const {
  return reinterpret_cast<const int32_t*>(block_.device) + list.begin + first;
}

}  // namespace automoe
