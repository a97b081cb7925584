// SPDX-License-Identifier: Apache-2.0
// A mailbox: one writer, one reader, in memory that both have mapped.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace automoe {

/// Messages of up to maxMessage() bytes in a ring of a power of two bytes.
/// Writer and reader run in different processes, each with a Ring of its own
/// from the start; each trusts its own position only and checks what it finds.
/// Layout, starting at a cache line:
///   head | tail | writerWaiting | bytes ...
/// and per message: u32 size, padding to 8, the bytes, padding to 8.
class Ring {
 public:
  static constexpr size_t kHeaderBytes = 192;

  /// A view on zeroed or already used memory of kHeaderBytes + capacity.
  Ring(std::byte* memory, size_t capacity);

  size_t maxMessage() const { return capacity_ / 4; }

  // Writer side.

  /// Appends the two parts as one message; false when there is no room.
  bool tryPush(
      std::span<const std::byte> first, std::span<const std::byte> second);
  /// Asks the reader to ring once it has made room.
  void requestRoom() {
    header().writerWaiting.store(1, std::memory_order_seq_cst);
  }

  // Reader side.

  /// The oldest message, in place, until pop(). Throws TransportError when
  /// what the writer left makes no sense.
  std::optional<std::span<const std::byte>> front();
  void pop();
  bool empty() const {
    return head_ == header().tail.load(std::memory_order_seq_cst);
  }
  /// True once when the writer has asked for room.
  bool takeRoomRequest() {
    return header().writerWaiting.load(std::memory_order_seq_cst) != 0 &&
           header().writerWaiting.exchange(0) != 0;
  }

 private:
  struct Header {
    alignas(64) std::atomic<uint64_t> head;
    alignas(64) std::atomic<uint64_t> tail;
    alignas(64) std::atomic<uint32_t> writerWaiting;
  };
  static_assert(sizeof(Header) == kHeaderBytes);

  Header& header() const { return *reinterpret_cast<Header*>(memory_); }
  std::byte* slot(uint64_t position) const {
    return memory_ + kHeaderBytes + (position & (capacity_ - 1));
  }

  std::byte* memory_;
  size_t capacity_;
  uint64_t head_ = 0;        // of the reader
  uint64_t tail_ = 0;        // of the writer
  uint64_t frontBytes_ = 0;  // of the message that front() returned
};

}  // namespace automoe
