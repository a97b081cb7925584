// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_memory.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

// Apart from the tags of users, which have 32 bits, and of barriers.
constexpr uint64_t kHandleTag = uint64_t{1} << 33;
constexpr size_t kSmallestArena = size_t{1} << 20;

}  // namespace

DeviceBuffer::~DeviceBuffer() {
  for (std::byte* memory : memory_) {
    device_.free(memory);
  }
}

std::byte* DeviceBuffer::atLeast(size_t bytes) {
  if (bytes > bytes_ || memory_.empty()) {
    const size_t grown = std::max({bytes, 2 * bytes_, size_t{256}});
    memory_.push_back(device_.allocate(grown));
    bytes_ = grown;
  }
  return memory_.back();
}

DeviceMemory::DeviceMemory(
    Engine& engine,
    Group& group,
    Device& device,
    Device::Stream stream,
    std::chrono::milliseconds timeout)
    : engine_(engine),
      group_(group),
      device_(device),
      self_(static_cast<size_t>(group.topology().localRank())),
      arenas_(device),
      flags_(device) {
  const Topology& topology = group.topology();
  for (int rank : topology.ranksOf(topology.node())) {
    mates_.emplace_back().rank = rank;
  }
  capacities_.assign(mates_.size(), 0);
  if (mates_.size() == 1) {
    return;
  }
  const size_t bytes = numFlags() * sizeof(uint32_t);
  auto* own = reinterpret_cast<uint32_t*>(flags_.atLeast(bytes));
  mates_[self_].flags = own;
  device.clear(stream, reinterpret_cast<std::byte*>(own), bytes);
  device.synchronize(stream);  // before anybody else writes them
  const auto handle = device.exportMemory(reinterpret_cast<std::byte*>(own));
  std::vector<size_t> from(mates_.size());
  std::iota(from.begin(), from.end(), size_t{0});
  Handles received(mates_.size());
  exchangeHandles(&handle, from, received, timeout);
  forEachMate([&](size_t local, Mate& mate) {
    mate.opened.push_back(device_.openMemory(received[local]));
    mate.flags = reinterpret_cast<uint32_t*>(mate.opened.back());
  });
}

DeviceMemory::~DeviceMemory() {
  closeAll();
  if (!left_ && mates_.size() > 1) {
    arenas_.keepForEver();
    flags_.keepForEver();
  }
}

void DeviceMemory::closeAll() noexcept {
  for (Mate& mate : mates_) {
    for (std::byte* memory : mate.opened) {
      device_.closeMemory(memory);
    }
    mate.opened.clear();
  }
}

void DeviceMemory::leave(std::chrono::milliseconds timeout) {
  closeAll();
  const Device::Handle goodbye;  // empty
  std::vector<size_t> from(mates_.size());
  std::iota(from.begin(), from.end(), size_t{0});
  Handles received(mates_.size());
  exchangeHandles(&goodbye, from, received, timeout);
  left_ = true;
}

template <typename See>
void DeviceMemory::forEachMate(const See& see) {
  for (size_t local = 0; local < mates_.size(); ++local) {
    if (local != self_) {
      see(local, mates_[local]);
    }
  }
}

void DeviceMemory::begin(
    std::span<const size_t> needs, std::chrono::milliseconds timeout) {
  which_ = (which_ + 1) % kArenas;
  Device::Handle handle;
  const Device::Handle* own = nullptr;
  std::vector<size_t> from;
  for (size_t local = 0; local < mates_.size(); ++local) {
    // Aligned, so that the second arena is.
    const size_t need = (needs[local] + 255) / 256 * 256;
    if (need <= capacities_[local]) {
      continue;
    }
    // The same on all ranks, which see the same needs.
    capacities_[local] =
        std::max({need, 2 * capacities_[local], kSmallestArena});
    from.push_back(local);
  }
  for (const size_t local : from) {
    if (local == self_) {
      mates_[self_].arena = arenas_.atLeast(kArenas * capacities_[self_]);
      if (mates_.size() > 1) {
        handle = device_.exportMemory(mates_[self_].arena);
        own = &handle;
      }
    }
  }
  if (from.empty() || mates_.size() == 1) {
    return;
  }
  Handles received(mates_.size());
  // The call that needs them has been posted with `timeout`: it is to be the
  // first that ends, with a text that says who has not posted it.
  exchangeHandles(own, from, received, 2 * timeout + std::chrono::seconds(10));
  for (const size_t local : from) {
    if (local != self_) {
      Mate& mate = mates_[local];
      mate.opened.push_back(device_.openMemory(received[local]));
      mate.arena = mate.opened.back();
    }
  }
}

std::byte* DeviceMemory::arena(size_t localRank) const {
  std::byte* first = mates_[localRank].arena;
  return first == nullptr ? nullptr : first + which_ * capacities_[localRank];
}

void DeviceMemory::exchangeHandles(
    const Device::Handle* own,
    std::span<const size_t> from,
    Handles& received,
    std::chrono::milliseconds timeout) {
  std::vector<std::shared_ptr<PairOperation>> mails;
  const auto post = [&](bool sends, int peer, const Device::Handle& handle) {
    PairArguments mail;
    mail.peer = peer;
    mail.tag = kHandleTag;
    mail.data = const_cast<std::byte*>(handle.bytes.data());
    mail.bytes = handle.bytes.size();
    mails.push_back(
        sends ? group_.send(mail, timeout, {})
              : group_.receive(mail, timeout, {}));
  };
  for (const size_t local : from) {
    if (local != self_) {
      post(false, mates_[local].rank, received[local]);
    }
  }
  if (own != nullptr) {
    forEachMate([&](size_t, Mate& mate) { post(true, mate.rank, *own); });
  }
  for (const auto& mail : mails) {
    engine_.wait(*mail, Engine::Clock::time_point::max());
  }
  for (const auto& mail : mails) {
    if (mail->error() != nullptr) {
      std::rethrow_exception(mail->error());
    }
  }
}

void DeviceMemory::set(Device::Stream stream, size_t row) {
  forEachMate([&](size_t, Mate& mate) {
    device_.setFlag(stream, mate.flags + row * mates_.size() + self_, 1);
  });
}

void DeviceMemory::await(Device::Stream stream, size_t row) {
  forEachMate([&](size_t local, Mate&) {
    uint32_t* flag = mates_[self_].flags + row * mates_.size() + local;
    device_.awaitFlag(stream, flag, 1);
    device_.setFlag(stream, flag, 0);
  });
}

void DeviceMemory::setReady(Device::Stream stream) {
  set(stream, which_);
}

void DeviceMemory::awaitReady(Device::Stream stream) {
  await(stream, which_);
}

void DeviceMemory::fence(Device::Stream stream, Fence which) {
  const size_t row = kArenas + static_cast<size_t>(which);
  set(stream, row);
  await(stream, row);
}

void DeviceMemory::releaseWaits() noexcept {
  uint32_t* own = mates_[self_].flags;
  const size_t count = own == nullptr ? 0 : numFlags();
  for (size_t i = 0; i < count; ++i) {
    device_.setFlagNow(own + i, 1);
  }
}

}  // namespace automoe
