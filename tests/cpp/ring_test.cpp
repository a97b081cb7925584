// SPDX-License-Identifier: Apache-2.0
// A mailbox: order, wrap-around, room, and a writer that lies.
#include "process_group/memory/ring.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

constexpr size_t kCapacity = 1024;
// Where the fields stand in the memory that both sides write; see ring.hpp.
constexpr size_t kHead = 0;
constexpr size_t kTail = 64;
constexpr size_t kBytes = Ring::kHeaderBytes;

/// Memory of exactly one ring, so that a sanitizer sees every step outside.
class RingMemory {
 public:
  explicit RingMemory(size_t capacity = kCapacity)
      : size_(Ring::kHeaderBytes + capacity),
        data_(static_cast<std::byte*>(std::aligned_alloc(64, size_))) {
    std::memset(data_.get(), 0, size_);
  }
  std::byte* data() const { return data_.get(); }
  size_t size() const { return size_; }
  template <typename T>
  void write(size_t offset, T value) const {
    std::memcpy(data_.get() + offset, &value, sizeof(value));
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  size_t size_;
  std::unique_ptr<std::byte, Free> data_;
};

std::vector<std::byte> message(size_t bytes, size_t seed) {
  std::vector<std::byte> content(bytes);
  for (size_t i = 0; i < bytes; ++i) {
    content[i] = static_cast<std::byte>((seed * 131 + i * 7) & 0xff);
  }
  return content;
}

bool push(Ring& ring, const std::vector<std::byte>& content) {
  const std::span<const std::byte> whole(content);
  const size_t first = content.size() / 3;
  return ring.tryPush(whole.first(first), whole.subspan(first));
}

void expectNext(Ring& ring, const std::vector<std::byte>& content) {
  const auto front = ring.front();
  ASSERT_TRUE(front.has_value());
  ASSERT_EQ(front->size(), content.size());
  EXPECT_TRUE(std::equal(front->begin(), front->end(), content.begin()));
  ring.pop();
}

TEST(RingTest, IsEmptyAtFirst) {
  const RingMemory memory;
  Ring ring(memory.data(), kCapacity);
  EXPECT_TRUE(ring.empty());
  EXPECT_FALSE(ring.front().has_value());
  EXPECT_FALSE(ring.takeRoomRequest());
}

TEST(RingTest, TwoPartsBecomeOneMessageThatStaysUntilPop) {
  const RingMemory memory;
  Ring writer(memory.data(), kCapacity);
  Ring reader(memory.data(), kCapacity);
  const auto content = message(100, 1);
  ASSERT_TRUE(push(writer, content));
  EXPECT_FALSE(reader.empty());
  ASSERT_TRUE(reader.front().has_value());
  expectNext(reader, content);
  EXPECT_TRUE(reader.empty());
  EXPECT_FALSE(reader.front().has_value());
}

TEST(RingTest, EmptyMessagesAreMessages) {
  const RingMemory memory;
  Ring ring(memory.data(), kCapacity);
  ASSERT_TRUE(ring.tryPush({}, {}));
  ASSERT_TRUE(ring.tryPush({}, {}));
  expectNext(ring, {});
  expectNext(ring, {});
  EXPECT_TRUE(ring.empty());
}

TEST(RingTest, EverySizeSurvivesEveryPlaceOfWrapping) {
  const RingMemory memory;
  Ring ring(memory.data(), kCapacity);
  size_t seed = 0;
  for (size_t start = 0; start < kCapacity; start += 8) {
    for (size_t bytes = 0; bytes <= ring.maxMessage(); bytes += 15) {
      const auto first = message(bytes, seed++);
      const auto second = message(ring.maxMessage() - bytes, seed++);
      ASSERT_TRUE(push(ring, first));
      ASSERT_TRUE(push(ring, second));
      expectNext(ring, first);
      expectNext(ring, second);
    }
    ASSERT_TRUE(ring.tryPush({}, {}));  // moves the start by 8 bytes
    ring.front();
    ring.pop();
  }
}

TEST(RingTest, WhatDoesNotFitIsRefusedWholeAndFitsAfterPop) {
  const RingMemory memory;
  Ring ring(memory.data(), kCapacity);
  size_t pushed = 0;
  while (push(ring, message(200, pushed))) {
    pushed += 1;
    ASSERT_LE(pushed, kCapacity / 200);
  }
  EXPECT_GE(pushed, 3);
  expectNext(ring, message(200, 0));
  EXPECT_TRUE(push(ring, message(200, pushed)));
  EXPECT_FALSE(push(ring, message(200, pushed + 1)));
  for (size_t i = 1; i <= pushed; ++i) {
    expectNext(ring, message(200, i));
  }
  EXPECT_TRUE(ring.empty());
}

TEST(RingTest, MessageAboveTheLimitIsAnError) {
  const RingMemory memory;
  Ring ring(memory.data(), kCapacity);
  EXPECT_THROW(push(ring, message(ring.maxMessage() + 1, 0)), Error);
  EXPECT_TRUE(push(ring, message(ring.maxMessage(), 0)));
}

TEST(RingTest, CapacityMustBeAPowerOfTwo) {
  const RingMemory memory(4096);
  EXPECT_THROW(Ring(memory.data(), 3000), Error);
  EXPECT_THROW(Ring(memory.data(), 512), Error);
  EXPECT_THROW(Ring(memory.data(), 0), Error);
}

TEST(RingTest, RoomRequestIsSeenOnce) {
  const RingMemory memory;
  Ring writer(memory.data(), kCapacity);
  Ring reader(memory.data(), kCapacity);
  writer.requestRoom();
  EXPECT_TRUE(reader.takeRoomRequest());
  EXPECT_FALSE(reader.takeRoomRequest());
}

uint32_t checksum(std::span<const std::byte> bytes) {
  uint32_t sum = 2166136261U;
  for (const std::byte it : bytes) {
    sum = (sum ^ static_cast<uint32_t>(it)) * 16777619U;
  }
  return sum;
}

// A writer that finds the ring full asks for room and sleeps until the reader
// has seen the request: a request that gets lost would leave both asleep.
TEST(RingTest, TwoThreadsLoseNeitherBytesNorRoomRequests) {
  constexpr int kMessages = 30000;
  const RingMemory memory;
  std::counting_semaphore<> filled(0);
  std::counting_semaphore<> room(0);
  std::string failure;
  std::thread writer([&] {
    Ring ring(memory.data(), kCapacity);
    std::mt19937 random(5);
    for (int i = 0; i < kMessages; ++i) {
      const auto content =
          message(random() % (ring.maxMessage() - 4), random());
      const uint32_t sum = checksum(content);
      const auto head = std::as_bytes(std::span(&sum, 1));
      while (!ring.tryPush(head, content)) {
        ring.requestRoom();
        if (ring.tryPush(head, content)) {
          break;
        }
        if (!room.try_acquire_for(std::chrono::seconds(30))) {
          failure = "the request for room was lost";
          return;
        }
      }
      filled.release();
    }
  });
  Ring ring(memory.data(), kCapacity);
  int wrong = 0;
  int got = 0;
  for (; got < kMessages; ++got) {
    if (!filled.try_acquire_for(std::chrono::seconds(40))) {
      break;
    }
    const auto front = ring.front();
    ASSERT_TRUE(front.has_value());
    uint32_t sum;
    std::memcpy(&sum, front->data(), sizeof(sum));
    wrong += checksum(front->subspan(sizeof(sum))) == sum ? 0 : 1;
    ring.pop();
    if (ring.takeRoomRequest()) {
      room.release();
    }
  }
  writer.join();
  EXPECT_EQ(failure, "");
  EXPECT_EQ(got, kMessages);
  EXPECT_EQ(wrong, 0);
  EXPECT_TRUE(ring.empty());
}

// ---- the other side is another process, and may write anything ----

TEST(RingTest, TailsThatMakeNoSenseAreRefused) {
  for (const uint64_t tail :
       {uint64_t{1},
        uint64_t{4},
        uint64_t{12},
        uint64_t{kCapacity + 8},
        uint64_t{1} << 32,
        uint64_t{1} << 63,
        ~uint64_t{0},
        ~uint64_t{7}}) {
    const RingMemory memory;
    Ring ring(memory.data(), kCapacity);
    memory.write(kTail, tail);
    EXPECT_THROW(ring.front(), TransportError) << tail;
  }
}

TEST(RingTest, LengthsThatMakeNoSenseAreRefused) {
  for (const uint32_t size :
       {uint32_t{101},  // more than has been published
        uint32_t{kCapacity / 4 + 1},
        uint32_t{kCapacity},
        uint32_t{1} << 31,
        ~uint32_t{0} - 1,
        ~uint32_t{0}}) {  // "skip" with nothing behind
    const RingMemory memory;
    Ring ring(memory.data(), kCapacity);
    ASSERT_TRUE(push(ring, message(96, 0)));
    memory.write(kBytes, size);
    EXPECT_THROW(ring.front(), TransportError) << size;
  }
}

/// A ring whose next message begins 64 bytes before the end.
Ring atTheEnd(const RingMemory& memory) {
  Ring ring(memory.data(), kCapacity);
  for (size_t at = 0; at < kCapacity - 64; at += 64) {
    EXPECT_TRUE(push(ring, message(56, 0)));
    EXPECT_TRUE(ring.front().has_value());
    ring.pop();
  }
  return ring;
}

TEST(RingTest, MessageAcrossTheEndIsRefused) {
  const RingMemory memory;
  Ring ring = atTheEnd(memory);
  memory.write(kTail, uint64_t{kCapacity + 64});
  memory.write(kBytes + kCapacity - 64, uint32_t{56});
  EXPECT_EQ(ring.front().value().size(), 56);
  memory.write(kBytes + kCapacity - 64, uint32_t{57});
  EXPECT_THROW(ring.front(), TransportError);
}

TEST(RingTest, SkipToAnotherSkipIsRefused) {
  const RingMemory memory;
  Ring ring = atTheEnd(memory);
  memory.write(kTail, uint64_t{kCapacity + 64});
  memory.write(kBytes + kCapacity - 64, ~uint32_t{0});
  memory.write(kBytes, uint32_t{56});
  EXPECT_EQ(ring.front().value().size(), 56);
  memory.write(kBytes, ~uint32_t{0});
  EXPECT_THROW(ring.front(), TransportError);
}

TEST(RingTest, ReaderStaysInsideWhateverIsWritten) {
  const RingMemory memory;
  Ring ring(memory.data(), kCapacity);
  std::mt19937_64 random(17);
  uint64_t position = 0;  // where the reader stands
  int messages = 0;
  int refused = 0;
  for (int round = 0; round < 50000; ++round) {
    const uint64_t ahead = random() % (kCapacity + 64) / 8 * 8;
    const uint64_t kind = random() % 16;
    memory.write(kHead, random());
    memory.write(
        kTail,
        kind == 0   ? random()
        : kind == 1 ? position + ahead + random() % 8
                    : position + ahead);
    for (size_t at = kBytes; at < memory.size(); at += 8) {
      const uint64_t what = random() % 8;
      memory.write(
          at,
          what == 0   ? ~uint64_t{0}
          : what == 1 ? random()
                      : random() % kCapacity);
    }
    try {
      const auto front = ring.front();
      if (front.has_value()) {
        messages += 1;
        ASSERT_GE(front->data(), memory.data() + kBytes);
        ASSERT_LE(front->data() + front->size(), memory.data() + memory.size());
        checksum(*front);  // reads all of it
        ring.pop();
        uint64_t head;
        std::memcpy(&head, memory.data() + kHead, sizeof(head));
        position = head;
      }
    } catch (const TransportError&) {
      refused += 1;
    }
  }
  EXPECT_GT(messages, 1000);
  EXPECT_GT(refused, 1000);
}

TEST(RingTest, WriterStaysInsideWhateverIsWritten) {
  // The ring, and behind it bytes that nobody may touch.
  const RingMemory memory(2 * kCapacity);
  Ring ring(memory.data(), kCapacity);
  const size_t end = kBytes + kCapacity;
  std::memset(memory.data() + end, 0x5a, kCapacity);
  const std::vector<std::byte> untouched(
      memory.data() + end, memory.data() + memory.size());
  std::mt19937_64 random(23);
  uint64_t tail = 0;  // where the writer stands
  int pushed = 0;
  for (int round = 0; round < 50000; ++round) {
    memory.write(
        kHead,
        random() % 4 == 0 ? random() : tail - std::min(tail, random() % 1100));
    memory.write(kTail, random() % 2 == 0 ? random() : tail + random() % 16);
    if (push(ring, message(random() % 257, 1))) {
      std::memcpy(&tail, memory.data() + kTail, sizeof(tail));
      pushed += 1;
    }
    ASSERT_EQ(std::memcmp(memory.data() + end, untouched.data(), kCapacity), 0);
  }
  EXPECT_GT(pushed, 1000);
}

}  // namespace
}  // namespace automoe
