// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_memory.hpp"

#include <algorithm>
#include <utility>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

// Apart from the tags of users, which have 32 bits, and of barriers.
constexpr uint64_t kHandleTag = uint64_t{1} << 33;
constexpr uint64_t kGoodbyeTag = kHandleTag + 1;
constexpr size_t kSmallestArena = size_t{1} << 20;

void awaitMails(
    Engine& engine, const std::vector<std::shared_ptr<PairOperation>>& mails) {
  for (const auto& mail : mails) {
    engine.wait(*mail, Engine::Clock::time_point::max());
  }
  for (const auto& mail : mails) {
    if (mail->error() != nullptr) {
      std::rethrow_exception(mail->error());
    }
  }
}

}  // namespace

DeviceBuffer::~DeviceBuffer() {
  for (std::byte* memory : memory_) {
    device_.free(memory);
  }
}

std::byte* DeviceBuffer::atLeast(size_t bytes) {
  if (bytes > bytes_ || memory_.empty()) {
    const size_t grown = std::max({bytes, 2 * bytes_, size_t{256}});
    memory_.push_back(
        use_ == Use::kShared ? device_.allocateShared(grown)
                             : device_.allocate(grown));
    bytes_ = grown;
  }
  return memory_.back();
}

DeviceMemory::DeviceMemory(Engine& engine, Group& group, Device& device)
    : engine_(engine),
      group_(group),
      device_(device),
      self_(static_cast<size_t>(group.topology().localRank())),
      arenas_(device, DeviceBuffer::Use::kShared) {
  const Topology& topology = group.topology();
  for (int rank : topology.ranksOf(topology.node())) {
    mates_.emplace_back().rank = rank;
  }
  capacities_.assign(mates_.size(), 0);
}

DeviceMemory::~DeviceMemory() {
  if (!kept_) {
    closeAll();
  }
  if (kept_ || (opened_ && !left_)) {
    arenas_.keepForEver();
    if (flags_.has_value()) {
      flags_->keepForEver();
    }
  } else if (self_ == 0 && extent_.offset != 0) {
    NodePages::giveBack(engine_.memory(), extent_);
  }
}

DeviceMemory::Offer DeviceMemory::offer() {
  Offer own;
  if (mates_.size() == 1) {
    return own;
  }
  std::byte* arena = arenas_.atLeast(kArenas * kSmallestArena);
  mates_[self_].arena = arena;
  own.arenas = device_.exportMemory(arena);
  if (self_ == 0) {
    ownPages_.emplace(
        NodePages::make(engine_.memory(), DeviceFlags::bytesFor(flagsShape())));
    extent_ = ownPages_->extent();
    own.flags = ownPages_->offset();
  }
  return own;
}

void DeviceMemory::open(std::span<const Offer> offers) {
  if (mates_.size() == 1) {
    return;
  }
  opened_ = true;
  capacities_.assign(mates_.size(), kSmallestArena);
  if (!ownPages_.has_value()) {
    const std::lock_guard lock(engine_.mutex());
    ownPages_.emplace(NodePages::attach(
        group_.mate(mates_[0].rank).segment(),
        offers[0].flags,
        DeviceFlags::bytesFor(flagsShape())));
  }
  flags_.emplace(device_, std::move(*ownPages_), flagsShape());
  forEachMate([&](size_t local, Mate& mate) {
    mate.opened.push_back(device_.openMemory(offers[local].arenas));
    mate.arena = mate.opened.back();
  });
}

void DeviceMemory::tryFlags(Device::Stream stream) {
  if (flags_.has_value()) {
    flags_->tryOwn(stream);
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
  if (flags_.has_value() && !kept_) {
    flags_->leave();
  }
  flags_.reset();
  std::vector<std::shared_ptr<PairOperation>> goodbyes;
  PairArguments goodbye;  // without bytes, so that no send waits for its mate
  goodbye.tag = kGoodbyeTag;
  goodbye.mayLapse = true;
  forEachMate([&](size_t, Mate& mate) {
    goodbye.peer = mate.rank;
    goodbyes.push_back(group_.receive(goodbye, timeout, {}));
    group_.send(goodbye, timeout, {});
  });
  awaitMails(engine_, goodbyes);
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
  awaitMails(engine_, mails);
}

void DeviceMemory::setReady(Device::Stream stream) {
  if (flags_.has_value()) {
    flags_->set(stream, which_);
  }
}

void DeviceMemory::awaitReady(Device::Stream stream) {
  if (flags_.has_value()) {
    flags_->await(stream, which_);
  }
}

void DeviceMemory::fence(Device::Stream stream, Fence which) {
  if (flags_.has_value()) {
    const size_t row = kArenas + static_cast<size_t>(which);
    flags_->set(stream, row);
    flags_->await(stream, row);
  }
}

void DeviceMemory::releaseWaits() noexcept {
  if (flags_.has_value()) {
    flags_->release();
  }
}

std::optional<int> DeviceMemory::releaseWaitsForGone() noexcept {
  std::optional<int> missed;
  forEachMate([&](size_t local, const Mate& mate) {
    if (flags_.has_value() && flags_->hasLeft(local) &&
        flags_->standInFor(local)) {
      missed = mate.rank;
    }
  });
  return missed;
}

}  // namespace automoe
