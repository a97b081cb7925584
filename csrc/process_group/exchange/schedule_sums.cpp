// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/schedule_sums.hpp"

#include "process_group/exchange/schedule_parts.hpp"

namespace automoe {
namespace {

// Of a ring. Enough pieces are under way at a time to keep a link busy.
constexpr uint64_t kScratchBytes = 2 << 20;
constexpr std::size_t kFewestSlots = 4;

}  // namespace

ScratchRing::Slot& ScratchRing::next(uint64_t bytes) {
  if (slots_.size() < kFewestSlots || total_ + bytes <= kScratchBytes) {
    total_ += bytes;
    return slots_.emplace_back(Slot{schedule_.scratch(bytes), bytes, {}});
  }
  Slot& slot = slots_[turn_++ % slots_.size()];
  if (slot.bytes < bytes) {
    // The old memory stays with the schedule until its end.
    slot = {schedule_.scratch(bytes), bytes, {}};
  }
  return slot;
}

Sums::Sums(Schedule& schedule, const Topology& topology)
    : schedule_(schedule),
      topology_(topology),
      mates_(schedule),
      nodes_(schedule) {}

Sums::Array Sums::add(
    std::span<const int> ranks,
    uint32_t slot,
    const Array& own,
    const Goal& goal,
    ScratchRing& ring) {
  if (ranks.size() == 1 && !goal.last) {
    return own;
  }
  const uint64_t bytes = goal.bytes;
  ScratchRing::Slot& landing = ring.next((ranks.size() - 1) * bytes);
  std::byte* free = landing.memory;
  std::vector<const std::byte*> inputs;
  std::vector<Schedule::Id> after = own.after;
  for (const int rank : ranks) {
    if (rank == topology_.rank()) {
      inputs.push_back(own.data);
      continue;
    }
    after.push_back(schedule_.receive(rank, slot, free, bytes, landing.users));
    inputs.push_back(free);
    free += bytes;
  }
  const bool inScratch = goal.to == nullptr;
  std::byte* to = inScratch ? landing.memory : goal.to;
  const Schedule::Id sum =
      schedule_.reduce(to, std::move(inputs), bytes, goal.last, after);
  landing.users = {sum};
  if (own.scratch != nullptr) {
    own.scratch->users = {sum};
  }
  return {to, {sum}, inScratch ? &landing : nullptr};
}

Sums::Array Sums::addNode(
    int leader, uint32_t slot, const Array& from, const Goal& goal) {
  if (topology_.rank() != leader) {
    send(leader, slot, from, goal.bytes);
    return {};
  }
  return add(topology_.ranksOf(topology_.node()), slot, from, goal, mates_);
}

Sums::Array Sums::addOnto(
    int target,
    uint32_t slot,
    const std::byte* from,
    std::byte* to,
    uint64_t bytes) {
  const bool oneNode = topology_.numNodes() == 1;
  const int standIn = topology_.railPeerOf(target, topology_.node());
  const Array partial =
      addNode(standIn, slot, {from}, {oneNode ? to : nullptr, bytes, oneNode});
  if (oneNode || topology_.rank() != standIn) {
    return partial;
  }
  if (topology_.rank() != target) {
    send(target, slot, partial, bytes);
    return {};
  }
  return add(
      standInsOf(topology_, target), slot, partial, {to, bytes, true}, nodes_);
}

void Sums::send(int peer, uint32_t slot, const Array& array, uint64_t bytes) {
  const Schedule::Id sent =
      schedule_.send(peer, slot, array.data, bytes, array.after);
  if (array.scratch != nullptr) {
    array.scratch->users = {sent};
  }
}

}  // namespace automoe
