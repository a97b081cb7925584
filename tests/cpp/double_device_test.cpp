// SPDX-License-Identifier: Apache-2.0
// The test double of Device: it shows a missing event or flag as wrong bytes
// and a cyclic wait as a text, and it fails where the test asks it to.
#include "cuda/double_device.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <future>
#include <string>
#include <vector>

#include "cuda/double_calls.hpp"
#include "cuda/double_memory.hpp"
#include "ranks.hpp"

namespace automoe::testing {
namespace {

// ---- Orders ----

// Two blocks of the host go through one buffer of the device. Returns whether
// the right bytes came out; `missing` is the await that is left out.
bool reusesBuffer(unsigned seed, int missing) {
  DoubleWorld world(1, seed);
  TwoStreams rank(world);
  std::byte* in = rank->allocateHost(2 * kBytes);
  std::byte* out = rank->allocateHost(2 * kBytes);
  std::byte* buffer = rank->allocate(kBytes);
  const auto filled = rank->makeEvent();
  const auto emptied = rank->makeEvent();
  words(in, 10);
  words(in + kBytes, 20);
  for (size_t block = 0; block < 2; ++block) {
    if (missing != 0) {
      rank->await(rank.first, emptied);
    }
    rank->copy(rank.first, buffer, in + block * kBytes, kBytes);
    rank->record(filled, rank.first);
    if (missing != 1) {
      rank->await(rank.second, filled);
    }
    rank->copy(rank.second, out + block * kBytes, buffer, kBytes);
    rank->record(emptied, rank.second);
  }
  rank->synchronize(missing == 2 ? rank.first : rank.second);
  world.stall(0);  // what is late by now comes later than the host's read
  const bool right = has(out, 10) && has(out + kBytes, 20);
  world.resume(0);
  rank->free(buffer);
  rank->freeHost(in);
  rank->freeHost(out);
  rank->destroyEvent(filled);
  rank->destroyEvent(emptied);
  EXPECT_TRUE(world.errors().empty());
  return right;
}

int countRight(unsigned seeds, const std::function<bool(unsigned)>& program) {
  int right = 0;
  for (unsigned seed = 0; seed < seeds; ++seed) {
    right += program(seed) ? 1 : 0;
  }
  return right;
}

TEST(DoubleDevice, EventsOrderStreams) {
  EXPECT_EQ(
      countRight(kSeeds, [](unsigned s) { return reusesBuffer(s, -1); }), 200);
}

TEST(DoubleDevice, AMissingEventGivesWrongBytes) {
  for (int missing = 0; missing < 3; ++missing) {
    const int right = countRight(
        kFewSeeds, [&](unsigned s) { return reusesBuffer(s, missing); });
    EXPECT_LT(right, 30) << missing;
  }
}

// Rank 1 writes into memory of rank 0, twice; flags say "full" and "empty".
bool writesToPeer(unsigned seed, bool awaits) {
  DoubleWorld world(2, seed);
  std::promise<Device::Handle> handle;
  std::promise<void> read;
  bool right = false;
  runThreads(2, [&](int index) {
    TwoStreams rank(world, index);
    if (index == 0) {
      std::byte* shared = rank->allocate(kBytes + 8);
      std::byte* out = rank->allocateHost(2 * kBytes);
      uint32_t* full = asFlag(shared + kBytes);
      rank->clear(rank.first, shared + kBytes, 8);
      rank->synchronize(rank.first);
      handle.set_value(rank->exportMemory(shared));
      for (uint32_t turn = 1; turn <= 2; ++turn) {
        if (awaits) {
          rank->awaitFlag(rank.first, full, turn);
        }
        rank->copy(rank.first, out + (turn - 1) * kBytes, shared, kBytes);
        rank->setFlag(rank.first, full + 1, turn);
      }
      rank->synchronize(rank.first);
      right = has(out, 30) && has(out + kBytes, 40);
      read.get_future().wait();
      rank->free(shared);
      rank->freeHost(out);
    } else {
      std::byte* shared = rank->openMemory(handle.get_future().get());
      std::byte* in = rank->allocate(kBytes);
      uint32_t* full = asFlag(shared + kBytes);
      for (uint32_t turn = 1; turn <= 2; ++turn) {
        rank->run(rank.first, [=](kernels::DeviceStream) {
          words(in, turn == 1 ? 30 : 40);
        });
        if (awaits) {
          rank->awaitFlag(rank.first, full + 1, turn - 1);
        }
        rank->copy(rank.first, shared, in, kBytes);
        rank->setFlag(rank.first, full, turn);
      }
      rank->synchronize(rank.first);
      rank->closeMemory(shared);
      rank->free(in);
      read.set_value();
    }
  });
  for (int rank : {0, 1}) {
    EXPECT_TRUE(world.leaks(rank).empty()) << world.leaks(rank)[0];
  }
  EXPECT_TRUE(world.errors().empty()) << world.errors()[0];
  return right;
}

TEST(DoubleDevice, FlagsOrderRanks) {
  EXPECT_EQ(
      countRight(kSeeds, [](unsigned s) { return writesToPeer(s, true); }),
      200);
}

TEST(DoubleDevice, AMissingFlagGivesWrongBytes) {
  EXPECT_LT(
      countRight(kFewSeeds, [](unsigned s) { return writesToPeer(s, false); }),
      30);
}

TEST(DoubleDevice, AwaitTakesTheLatestRecord) {
  DoubleWorld world(1, 3);
  TwoStreams rank(world);
  std::byte* flag = rank->allocate(4);
  rank->clear(rank.first, flag, 4);
  const auto event = rank->makeEvent();
  EXPECT_TRUE(rank->happened(event));
  rank->await(rank.second, event);  // never recorded: does not wait
  rank->record(event, rank.first);
  rank->await(rank.second, event);
  rank->awaitFlag(rank.first, asFlag(flag), 1);
  rank->record(event, rank.first);
  rank->synchronize(rank.second);
  EXPECT_FALSE(rank->happened(event));
  rank->await(rank.second, event);
  rank->destroyEvent(event);  // what was awaited still counts
  world.settle();
  EXPECT_HAS(world.deadlocked(), "await event 1, then 0 more");
  std::atomic_ref(*asFlag(flag)).store(1);
  rank->synchronize(rank.second);
  EXPECT_EQ(world.deadlocked(), "");
  rank->free(flag);
  EXPECT_TRUE(world.errors().empty());
}

TEST(DoubleDevice, WorkOutlivesItsDeviceAndStream) {
  DoubleWorld world(1, 1);
  std::vector<std::byte> tensor(kBytes);
  world.adopt(0, tensor.data(), kBytes);
  world.stall(0);
  {
    const auto device = world.makeDevice(0);
    const auto stream = device->makeStream();
    device->clear(nullptr, tensor.data(), kBytes / 2);
    device->clear(stream, tensor.data() + kBytes / 2, kBytes / 2);
    device->destroyStream(stream);
    words(tensor.data(), 1);
    EXPECT_TRUE(has(tensor.data(), 1));
  }
  world.resume(0);
  world.settle();
  EXPECT_EQ(tensor, std::vector<std::byte>(kBytes));
}

// ---- Failures ----

TEST(DoubleDevice, WorkThatFailsFailsAllLaterCalls) {
  DoubleWorld world(2, 0);
  TwoStreams rank(world, 0);
  TwoStreams other(world, 1);
  std::byte* memory = rank->allocate(kBytes);
  std::byte* mine = other->allocate(kBytes);
  std::byte* mapped = other->openMemory(rank->exportMemory(memory));
  world.stall(1);
  other->copy(other.first, mine, mapped, kBytes);
  other->closeMemory(mapped);  // too early
  world.resume(1);
  EXPECT_HAS(
      deviceErrorOf([&] { other->synchronize(other.first); }),
      "copy 64 bytes: device memory 0 of rank 0 + 0 to device memory 1 of rank "
      "1 + 0: device memory 0 of rank 0 + 0 is not open in rank 1");
  EXPECT_HAS(deviceErrorOf([&] { other->makeStream(); }), "work failed before");
  EXPECT_EQ(world.errors().size(), 1u);
  rank->run(rank.first, [](auto) { throw DeviceError("no such kernel"); });
  EXPECT_HAS(
      deviceErrorOf([&] { rank->synchronize(rank.first); }), "no such kernel");
}

TEST(DoubleDevice, FailsAtTheCallThatTheTestNames) {
  DoubleWorld world(1, 0);
  TwoStreams rank(world);
  std::byte* memory = rank->allocate(kBytes);
  world.failAt(0, 2);
  rank->clear(rank.first, memory, kBytes);
  EXPECT_HAS(
      deviceErrorOf([&] { rank->clear(rank.first, memory, kBytes); }),
      "rank 0: clear: call 2 fails, as failAt() asked");
  rank->clear(rank.first, memory, kBytes);
  rank->synchronize(rank.first);
  const auto statistics = world.statistics(0);
  EXPECT_EQ(statistics.enqueued, 3u);
  EXPECT_EQ(statistics.items, 2u);
  EXPECT_EQ(statistics.synchronized, 1u);
  EXPECT_EQ(statistics.copiedBytes, 0u);
}

TEST(DoubleDevice, AStalledRankDoesNotMove) {
  DoubleWorld world(2, 0);
  world.setPatience(std::chrono::milliseconds(50));
  TwoStreams rank(world, 0);
  TwoStreams other(world, 1);
  std::byte* memory = rank->allocate(kBytes);
  std::byte* theirs = other->allocate(kBytes);
  world.stall(0);
  rank->clear(rank.first, memory, kBytes);
  other->clear(other.first, theirs, kBytes);
  other->synchronize(other.first);
  EXPECT_HAS(
      deviceErrorOf([&] { rank->synchronize(rank.first); }),
      "rank 0: synchronize: stream 2: no stream can move: rank 0, stream 2 "
      "(stalled): clear 64 bytes: device memory 0 of rank 0 + 0, then 0 more");
  EXPECT_EQ(memory[0], static_cast<std::byte>(kPoison));
  rank->free(memory);  // does not hang either
  EXPECT_HAS(world.errors().at(0), "free does not wait longer");
  world.resume(0);
  world.settle();
  EXPECT_HAS(world.errors().at(1), "was freed");
}

TEST(DoubleDevice, ACyclicWaitIsNamed) {
  DoubleWorld world(1, 0);
  world.setPatience(std::chrono::milliseconds(50));
  TwoStreams rank(world);
  std::byte* flags = rank->allocate(8);
  rank->clear(rank.first, flags, 8);
  rank->synchronize(rank.first);
  rank->awaitFlag(rank.first, asFlag(flags), 1);
  rank->setFlag(rank.first, asFlag(flags) + 1, 1);
  rank->awaitFlag(rank.second, asFlag(flags) + 1, 1);
  rank->setFlag(rank.second, asFlag(flags), 1);
  const std::string error =
      deviceErrorOf([&] { rank->synchronize(rank.second); });
  EXPECT_HAS(
      error,
      "stream 1: await flag device memory 0 of rank 0 + 0 to be 1, it is 0, "
      "then 1 more; rank 0, stream 2: await flag device memory 0 of rank 0 + "
      "4");
  EXPECT_HAS(error, world.deadlocked());
  std::atomic_ref(*asFlag(flags)).store(1);
  rank->synchronize(rank.second);
  EXPECT_EQ(world.deadlocked(), "");
}

TEST(DoubleDevice, WorkMustNotBlockOnItsDevice) {
  DoubleWorld world(1, 0);
  TwoStreams rank(world);
  rank->run(rank.first, [&](auto) { rank->synchronize(rank.second); });
  EXPECT_HAS(
      deviceErrorOf([&] { rank->synchronize(rank.first); }),
      "was called by work");
}

}  // namespace
}  // namespace automoe::testing
