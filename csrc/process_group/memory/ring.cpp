// SPDX-License-Identifier: Apache-2.0
#include "process_group/memory/ring.hpp"

#include <bit>
#include <cstring>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

constexpr uint64_t kPrefixBytes = 8;
// Stands where a message did not fit before the end of the ring.
constexpr uint32_t kSkip = 0xffffffff;

uint64_t slotBytes(uint64_t message) {
  return kPrefixBytes + (message + 7) / 8 * 8;
}

}  // namespace

Ring::Ring(std::byte* memory, size_t capacity)
    : memory_(memory), capacity_(capacity) {
  AUTOMOE_CHECK(
      std::has_single_bit(capacity) && capacity >= 1024,
      "ring capacity ",
      capacity);
}

bool Ring::tryPush(
    std::span<const std::byte> first, std::span<const std::byte> second) {
  const uint64_t bytes = first.size() + second.size();
  AUTOMOE_CHECK(bytes <= maxMessage(), "message of ", bytes, " bytes");
  uint64_t tail = tail_;
  const uint64_t toEnd = capacity_ - (tail & (capacity_ - 1));
  const uint64_t skipped = toEnd < slotBytes(bytes) ? toEnd : 0;
  const uint64_t head = header().head.load(std::memory_order_seq_cst);
  if (head > tail || tail + skipped + slotBytes(bytes) - head > capacity_) {
    return false;  // full, or the reader's position makes no sense
  }
  if (skipped > 0) {
    std::memcpy(slot(tail), &kSkip, sizeof(kSkip));
    tail += skipped;
  }
  const auto size = static_cast<uint32_t>(bytes);
  std::byte* to = slot(tail);
  std::memcpy(to, &size, sizeof(size));
  if (!first.empty()) {
    std::memcpy(to + kPrefixBytes, first.data(), first.size());
  }
  if (!second.empty()) {
    std::memcpy(to + kPrefixBytes + first.size(), second.data(), second.size());
  }
  tail_ = tail + slotBytes(bytes);
  header().tail.store(tail_, std::memory_order_seq_cst);
  return true;
}

std::optional<std::span<const std::byte>> Ring::front() {
  uint64_t head = head_;
  const uint64_t tail = header().tail.load(std::memory_order_acquire);
  if (head == tail) {
    return std::nullopt;
  }
  const auto check = [&](bool good) {
    if (!good) {
      throw TransportError("a mailbox holds a message that makes no sense");
    }
  };
  check(tail - head <= capacity_ && (tail - head) % 8 == 0);
  uint32_t size;
  std::memcpy(&size, slot(head), sizeof(size));
  uint64_t skipped = 0;
  if (size == kSkip) {
    skipped = capacity_ - (head & (capacity_ - 1));
    check(skipped < tail - head);
    head += skipped;
    std::memcpy(&size, slot(head), sizeof(size));
  }
  check(size <= maxMessage() && slotBytes(size) <= tail - head);
  check(slotBytes(size) <= capacity_ - (head & (capacity_ - 1)));
  frontBytes_ = skipped + slotBytes(size);
  return std::span<const std::byte>(slot(head) + kPrefixBytes, size);
}

void Ring::pop() {
  head_ += frontBytes_;
  header().head.store(head_, std::memory_order_seq_cst);
}

}  // namespace automoe
