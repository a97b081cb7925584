// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_flags.hpp"

#include <algorithm>
#include <utility>

namespace automoe {
namespace {

// Of a cache line: ranks that wait do not share one.
constexpr size_t kLine = 64 / sizeof(uint32_t);

// Of what one rank waits for; behind its rows, whether it has left.
size_t lineOf(const DeviceFlags::Shape& shape) {
  return (shape.rows * shape.mates + 1 + kLine - 1) / kLine * kLine;
}

}  // namespace

size_t DeviceFlags::bytesFor(const Shape& shape) {
  return lineOf(shape) * shape.mates * sizeof(uint32_t);
}

DeviceFlags::DeviceFlags(Device& device, NodePages pages, const Shape& shape)
    : device_(device), pages_(std::move(pages)), shape_(shape) {
  mapped_ = reinterpret_cast<uint32_t*>(
      device_.mapHost(pages_.data(), pages_.bytes()));
}

DeviceFlags::~DeviceFlags() {
  if (!kept_) {
    device_.unmapHost(pages_.data());
  }
}

void DeviceFlags::keepForEver() {
  pages_.keepForEver();
  kept_ = true;
}

size_t DeviceFlags::placeOf(size_t receiver, size_t row, size_t sender) const {
  return receiver * lineOf(shape_) + row * shape_.mates + sender;
}

void DeviceFlags::set(Device::Stream stream, size_t row) {
  std::vector<uint32_t*> flags;
  for (size_t mate = 0; mate < shape_.mates; ++mate) {
    if (mate != shape_.self) {
      flags.push_back(mapped_ + placeOf(mate, row, shape_.self));
    }
  }
  device_.setFlags(stream, flags, 1);
}

void DeviceFlags::await(Device::Stream stream, size_t row) {
  std::vector<uint32_t*> flags;
  for (size_t mate = 0; mate < shape_.mates; ++mate) {
    if (mate != shape_.self) {
      flags.push_back(mapped_ + placeOf(shape_.self, row, mate));
    }
  }
  device_.awaitFlags(stream, flags, 1, 0);
}

void DeviceFlags::tryOwn(Device::Stream stream) {
  uint32_t* flag = mapped_ + placeOf(shape_.self, 0, shape_.self);
  device_.setFlag(stream, flag, 1);
  device_.awaitFlags(stream, {&flag, 1}, 1, 0);
}

std::atomic_ref<uint32_t> DeviceFlags::word(size_t place) const noexcept {
  return std::atomic_ref(reinterpret_cast<uint32_t*>(pages_.data())[place]);
}

void DeviceFlags::release() noexcept {
  for (size_t row = 0; row < shape_.rows; ++row) {
    for (size_t mate = 0; mate < shape_.mates; ++mate) {
      word(placeOf(shape_.self, row, mate)).store(1, std::memory_order_release);
    }
  }
}

void DeviceFlags::leave() noexcept {
  word(placeOf(shape_.self, shape_.rows, 0))
      .store(1, std::memory_order_release);
}

bool DeviceFlags::hasLeft(size_t mate) const noexcept {
  return word(placeOf(mate, shape_.rows, 0)).load(std::memory_order_acquire) !=
         0;
}

bool DeviceFlags::standInFor(size_t mate) noexcept {
  bool taken = false;
  for (size_t row = 0; row < shape_.rows; ++row) {
    const size_t place = placeOf(shape_.self, row, mate);
    // Only the own streams clear it by now.
    if (word(place).load(std::memory_order_acquire) != 0) {
      continue;
    }
    if (std::ranges::find(ownSets_, place) != ownSets_.end()) {
      taken = true;
    } else {
      ownSets_.push_back(place);
    }
    word(place).store(1, std::memory_order_release);
  }
  return taken;
}

}  // namespace automoe
