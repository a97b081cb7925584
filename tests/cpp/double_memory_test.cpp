// SPDX-License-Identifier: Apache-2.0
// The test double of Device refuses memory that a device would not have.
#include "cuda/double_memory.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "cuda/double_calls.hpp"

namespace automoe::testing {
namespace {

TEST(DoubleMemory, MemoryIsPoisonedAndAligned) {
  DoubleWorld world(1, 0);
  const auto device = world.makeDevice(0);
  std::byte* memory = device->allocate(kBytes);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % 256, 0u);
  EXPECT_TRUE(std::all_of(memory, memory + kBytes, [](std::byte value) {
    return value == static_cast<std::byte>(kPoison);
  }));
  EXPECT_EQ(
      world.leaks(0), std::vector{std::string("device memory 0 of rank 0")});
  words(memory, 1);
  device->free(memory);
  EXPECT_TRUE(world.leaks(0).empty());
#ifndef __SANITIZE_ADDRESS__  // which refuses the access
  EXPECT_EQ(memory[kBytes - 1], static_cast<std::byte>(kPoison));
#endif
  EXPECT_EQ(device->allocate(0), nullptr);
  device->free(nullptr);
  device->freeHost(nullptr);
  EXPECT_TRUE(world.errors().empty());
}

TEST(DoubleMemory, FreeWaitsForTheWorkOfTheDevice) {
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    DoubleWorld world(1, seed);
    TwoStreams rank(world);
    std::byte* in = rank->allocateHost(kBytes);
    std::byte* buffer = rank->allocate(kBytes);
    std::byte* out = rank->allocateHost(kBytes);
    rank->copy(rank.first, buffer, words(in, 5), kBytes);
    rank->copy(rank.first, out, buffer, kBytes);
    rank->free(buffer);
    ASSERT_TRUE(has(out, 5)) << seed;
    rank->freeHost(in);
    rank->freeHost(out);
    ASSERT_TRUE(world.errors().empty()) << world.errors()[0];
  }
}

TEST(DoubleMemory, RefusesMemoryThatIsNotTheRanks) {
  DoubleWorld world(2, 0);
  TwoStreams rank(world, 0);
  TwoStreams other(world, 1);
  std::byte* mine = rank->allocate(kBytes);
  std::byte* gone = rank->allocate(kBytes);
  std::byte* theirs = other->allocate(kBytes);
  std::byte* locked = other->allocateHost(kBytes);
  rank->free(gone);
  const auto copy = [&](std::byte* to, const std::byte* from) {
    return deviceErrorOf([&] { rank->copy(rank.first, to, from, kBytes); });
  };
  EXPECT_HAS(copy(mine, gone), "device memory 1 of rank 0 + 0 was freed");
  EXPECT_HAS(copy(gone, mine), "was freed");
  EXPECT_HAS(copy(mine, theirs), "is not open in rank 0");
  EXPECT_HAS(copy(mine, locked), "is not open in rank 0");
  EXPECT_HAS(copy(mine + 1, mine), "64 bytes pass the end of its 64");
  EXPECT_HAS(
      deviceErrorOf([&] { rank->clear(rank.first, theirs, kBytes); }),
      "rank 0: clear");
  EXPECT_HAS(
      deviceErrorOf([&] { rank->setFlag(rank.first, asFlag(gone), 1); }),
      "freed");
  EXPECT_HAS(
      deviceErrorOf([&] { rank->awaitFlag(rank.first, asFlag(theirs), 1); }),
      "open");
  EXPECT_HAS(
      deviceErrorOf([&] { rank->setFlag(rank.first, asFlag(mine + 2), 1); }),
      "align");
  EXPECT_TRUE(world.errors().empty());
  EXPECT_EQ(world.statistics(0).items, 0u);
}

TEST(DoubleMemory, PagesOfTheHostAreMapped) {
  DoubleWorld world(1, 0);
  TwoStreams rank(world);
  alignas(4096) std::byte pages[4096] = {};
  EXPECT_HAS(
      deviceErrorOf([&] { rank->setFlag(rank.first, asFlag(pages), 1); }),
      "is not memory of the device");
  uint32_t* flag = asFlag(rank->mapHost(pages, sizeof(pages)));
  EXPECT_HAS(world.leaks(0).at(0), "mapped memory");
  rank->awaitFlags(rank.first, {&flag, 1}, 1, 7);
  world.settle();
  EXPECT_HAS(world.deadlocked(), "to be 1, it is 0");
  std::atomic_ref(*flag).store(1);
  rank->synchronize(rank.first);
  EXPECT_EQ(*flag, 7U);
  rank->unmapHost(pages);
  rank->unmapHost(pages);
  EXPECT_HAS(world.errors().at(0), "was not allocated");
}

TEST(DoubleMemory, OrdinaryHostMemoryIsReadWhenItIsEnqueued) {
  DoubleWorld world(1, 0);
  TwoStreams rank(world);
  std::byte* memory = rank->allocate(kBytes);
  std::byte* out = rank->allocateHost(kBytes);
  world.stall(0);
  {
    std::vector<std::byte> in(kBytes);
    rank->copy(rank.first, memory, words(in.data(), 7), kBytes);
    words(in.data(), 8);
    EXPECT_HAS(
        deviceErrorOf(
            [&] { rank->copy(rank.first, in.data(), memory, kBytes); }),
        "use allocate() or allocateHost()");
  }
  rank->copy(rank.first, out, memory, kBytes);
  world.resume(0);
  rank->synchronize(rank.first);
  EXPECT_TRUE(has(out, 7));
  EXPECT_EQ(world.statistics(0).pageableCopies, 1u);
}

TEST(DoubleMemory, AdoptedMemoryIsTheDevicesUntilDisowned) {
  DoubleWorld world(1, 0);
  TwoStreams rank(world);
  std::vector<std::byte> tensor(2 * kBytes);
  const auto clear = [&] {
    return deviceErrorOf(
        [&] { rank->clear(rank.first, tensor.data(), kBytes); });
  };
  EXPECT_HAS(clear(), "adopt() it in the test");
  world.adopt(0, tensor.data() + kBytes, kBytes);
  EXPECT_HAS(
      deviceErrorOf([&] { world.adopt(0, tensor.data(), kBytes + 1); }),
      "reach into");
  world.adopt(0, tensor.data(), kBytes);
  EXPECT_EQ(clear(), "no error");
  EXPECT_HAS(
      deviceErrorOf([&] { rank->exportMemory(tensor.data()); }), "exported");
  rank->free(tensor.data());
  EXPECT_HAS(world.errors().at(0), "does not come from this kind of allocate");
  rank->synchronize(rank.first);
  world.disown(0, tensor.data());
  EXPECT_HAS(clear(), "adopt() it in the test");
  EXPECT_TRUE(world.leaks(0).size() == 2) << "only the streams";
}

TEST(DoubleMemory, HandlesOpenAndClose) {
  DoubleWorld world(3, 0);
  TwoStreams rank(world, 0);
  TwoStreams other(world, 1);
  std::byte* memory = rank->allocate(kBytes);
  const auto handle = rank->exportMemory(memory);
  const auto open = [&](TwoStreams& by, const Device::Handle& which) {
    return deviceErrorOf([&] { by->openMemory(which); });
  };
  EXPECT_HAS(
      deviceErrorOf([&] { rank->exportMemory(memory + 1); }), "cannot be exp");
  EXPECT_HAS(deviceErrorOf([&] { other->exportMemory(memory); }), "of rank 1");
  EXPECT_HAS(open(rank, handle), "exported by the same process");
  EXPECT_HAS(open(other, {}), "not a handle");
  std::byte* mapped = other->openMemory(handle);
  other->openMemory(handle);
  other->closeMemory(mapped);
  other->clear(other.first, mapped, kBytes);  // it is still open once
  other->synchronize(other.first);
  other->closeMemory(mapped);
  EXPECT_TRUE(world.errors().empty());
  EXPECT_HAS(
      deviceErrorOf([&] { other->clear(other.first, mapped, kBytes); }),
      "not open");
  other->closeMemory(mapped);
  EXPECT_HAS(world.errors().at(0), "rank 1: closeMemory");
  other->openMemory(handle);
  EXPECT_HAS(world.leaks(1).at(0), "device memory 0 of rank 0, open in rank 1");
  rank->free(memory);
  EXPECT_HAS(world.errors().at(1), "is freed while rank 1 has it open");
  rank->free(memory);
  EXPECT_HAS(world.errors().at(2), "was freed before");
  EXPECT_HAS(open(other, handle), "was freed");
}

TEST(DoubleMemory, RefusesStreamsAndEventsThatAreNotTheRanks) {
  DoubleWorld world(2, 0);
  TwoStreams rank(world, 0);
  TwoStreams other(world, 1);
  const auto event = other->makeEvent();
  const auto stream = rank->makeStream();
  rank->destroyStream(stream);
  EXPECT_HAS(
      deviceErrorOf([&] { rank->record(event, rank.first); }),
      "is one of rank 1");
  EXPECT_HAS(
      deviceErrorOf([&] { rank->synchronize(other.first); }),
      "is one of rank 1");
  EXPECT_HAS(
      deviceErrorOf([&] { rank->synchronize(stream); }), "does not exist");
  EXPECT_EQ(world.leaks(1).size(), 3u);
  other->destroyEvent(event);
  other->destroyEvent(event);
  EXPECT_HAS(world.errors().at(0), "destroyEvent: event 1 does not exist");
}

}  // namespace
}  // namespace automoe::testing
