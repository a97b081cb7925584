// SPDX-License-Identifier: Apache-2.0
// Captures and graphs of the test double: what is recorded runs at each launch,
// in any order that the capture allows, and what CUDA refuses is refused.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/double_calls.hpp"
#include "cuda/double_device.hpp"
#include "ranks.hpp"

namespace automoe::testing {
namespace {

using Graph = std::shared_ptr<DoubleGraph>;

int countRight(unsigned seeds, const std::function<bool(unsigned)>& program) {
  int right = 0;
  for (unsigned seed = 0; seed < seeds; ++seed) {
    right += program(seed) ? 1 : 0;
  }
  return right;
}

void add(std::byte* memory, int number) {
  for (size_t i = 0; i < kBytes; ++i) {
    const int sum = std::to_integer<int>(memory[i]) + number;
    memory[i] = static_cast<std::byte>(sum);
  }
}

// ---- What runs, and in which order ----

TEST(DoubleGraph, RunsAtEachLaunchAndNotBefore) {
  DoubleWorld world(1, 1);
  TwoStreams rank(world);
  std::byte* in = words(rank->allocateHost(kBytes), 1);
  std::byte* out = rank->allocateHost(kBytes);
  std::byte* memory = rank->allocate(kBytes);
  world.beginCapture(0, rank.first);
  EXPECT_TRUE(rank->isCapturing(rank.first));
  EXPECT_FALSE(rank->isCapturing(rank.second));
  rank->copy(rank.first, memory, in, kBytes);
  rank->run(rank.first, [=](auto) { add(memory, 5); });
  rank->copy(rank.first, out, memory, kBytes);
  const Graph graph = world.endCapture(0, rank.first);
  EXPECT_FALSE(rank->isCapturing(rank.first));
  world.settle();
  EXPECT_EQ(world.statistics(0).items, 0u);
  EXPECT_EQ(memory[0], std::byte{0xCB});
  for (const int first : {1, 7, 20}) {
    words(in, first);
    world.launch(graph, first == 7 ? rank.second : rank.first);
    rank->synchronize(first == 7 ? rank.second : rank.first);
    EXPECT_TRUE(has(out, first + 5));
  }
  // What the stream gets now runs at once.
  rank->clear(rank.first, out, kBytes);
  rank->synchronize(rank.first);
  EXPECT_EQ(out[0], std::byte{0});
  EXPECT_TRUE(world.errors().empty());
}

enum class Missing { kNone, kFork, kJoin };

// Each half of a buffer is filled by a stream of its own, both from memory that
// the first stream has written, and copied out by the first one.
bool forksAndJoins(unsigned seed, Missing missing) {
  DoubleWorld world(1, seed);
  TwoStreams rank(world);
  std::byte* memory = rank->allocate(3 * kBytes);
  std::byte* out = rank->allocateHost(2 * kBytes);
  const auto forked = rank->makeEvent();
  const auto written = rank->makeEvent();
  const auto joined = rank->makeEvent();
  world.beginCapture(0, rank.first);
  rank->record(forked, rank.first);
  rank->await(rank.second, forked);
  rank->run(rank.first, [=](auto) { words(memory, 40); });
  rank->record(written, rank.first);
  if (missing != Missing::kFork) {
    rank->await(rank.second, written);
  }
  rank->copy(rank.first, memory + kBytes, memory, kBytes);
  const auto copySecond = [&] {
    rank->copy(rank.second, memory + 2 * kBytes, memory, kBytes);
  };
  if (missing == Missing::kJoin) {
    rank->record(joined, rank.second);  // too early
    copySecond();
    const auto end = rank->makeEvent();
    rank->record(end, rank.second);
    rank->await(rank.first, joined);
    rank->copy(rank.first, out, memory + kBytes, 2 * kBytes);
    rank->await(rank.first, end);
  } else {
    copySecond();
    rank->record(joined, rank.second);
    rank->await(rank.first, joined);
    rank->copy(rank.first, out, memory + kBytes, 2 * kBytes);
  }
  const Graph graph = world.endCapture(0, rank.first);
  bool right = true;
  for (int replay = 0; replay < 3; ++replay) {
    rank->clear(rank.first, memory, 3 * kBytes);
    world.launch(graph, rank.first);
    rank->synchronize(rank.first);
    right = right && has(out, 40) && has(out + kBytes, 40);
  }
  EXPECT_TRUE(world.errors().empty()) << world.errors()[0];
  return right;
}

TEST(DoubleGraph, EventsOrderItsNodes) {
  EXPECT_EQ(
      countRight(
          kSeeds, [](unsigned s) { return forksAndJoins(s, Missing::kNone); }),
      200);
}

TEST(DoubleGraph, AMissingEventGivesWrongBytes) {
  for (const Missing missing : {Missing::kFork, Missing::kJoin}) {
    const int right = countRight(
        kFewSeeds, [&](unsigned s) { return forksAndJoins(s, missing); });
    EXPECT_LT(right, 30) << static_cast<int>(missing);
  }
}

// The events that order streams outside do not order nodes of a graph with
// them, and a launch is ordered as any work of its stream.
bool readsAfterLaunch(unsigned seed, bool awaits) {
  DoubleWorld world(1, seed);
  TwoStreams rank(world);
  std::byte* memory = rank->allocate(kBytes);
  std::byte* out = rank->allocateHost(kBytes);
  const auto event = rank->makeEvent();
  world.beginCapture(0, rank.first);
  rank->run(rank.first, [=](auto) { words(memory, 9); });
  const Graph graph = world.endCapture(0, rank.first);
  rank->clear(rank.first, memory, kBytes);
  world.launch(graph, rank.first);
  rank->record(event, rank.first);
  if (awaits) {
    rank->await(rank.second, event);
  }
  rank->copy(rank.second, out, memory, kBytes);
  rank->synchronize(rank.second);
  return has(out, 9);
}

TEST(DoubleGraph, IsOrderedByTheStreamOfItsLaunch) {
  EXPECT_EQ(
      countRight(kSeeds, [](unsigned s) { return readsAfterLaunch(s, true); }),
      200);
  EXPECT_LT(
      countRight(
          kFewSeeds, [](unsigned s) { return readsAfterLaunch(s, false); }),
      30);
}

TEST(DoubleGraph, LaunchesOnTwoStreamsDoNotOverlap) {
  for (unsigned seed = 0; seed < kFewSeeds; ++seed) {
    DoubleWorld world(1, seed);
    TwoStreams rank(world);
    std::byte* memory = rank->allocate(2 * kBytes);
    rank->clear(rank.first, memory, 2 * kBytes);
    rank->synchronize(rank.first);
    world.beginCapture(0, rank.first);
    rank->copy(rank.first, memory + kBytes, memory, kBytes);
    rank->run(rank.first, [=](auto) { add(memory + kBytes, 1); });
    rank->copy(rank.first, memory, memory + kBytes, kBytes);
    const Graph graph = world.endCapture(0, rank.first);
    for (int launch = 0; launch < 6; ++launch) {
      world.launch(graph, launch % 2 == 0 ? rank.first : rank.second);
    }
    rank->synchronize(rank.first);
    rank->synchronize(rank.second);
    EXPECT_EQ(memory[0], std::byte{6}) << "seed " << seed;
  }
}

TEST(DoubleGraph, ItsNodesAreNamedWhereTheyWait) {
  DoubleWorld world(1, 2);
  world.setPatience(std::chrono::milliseconds(50));
  TwoStreams rank(world);
  std::byte* flags = rank->allocate(4);
  rank->clear(rank.first, flags, 4);
  rank->synchronize(rank.first);
  world.beginCapture(0, rank.first);
  rank->awaitFlag(rank.first, asFlag(flags), 1);
  rank->setFlag(rank.first, asFlag(flags), 0);
  const Graph graph = world.endCapture(0, rank.first);
  for (int launch = 1; launch < 3; ++launch) {
    world.launch(graph, rank.first);
    EXPECT_HAS(
        deviceErrorOf([&] { rank->synchronize(rank.first); }),
        concat(
            "graph 1 of rank 0, launch ",
            launch,
            ", node 0: await flag device memory 0 of rank 0 + 0 to be 1"));
    std::atomic_ref(*asFlag(flags)).store(1);
    rank->synchronize(rank.first);
  }
  world.stall(0);
  world.launch(graph, rank.first);
  world.settle();
  EXPECT_HAS(world.deadlocked(), "begin launch 3 of graph 1");
  std::atomic_ref(*asFlag(flags)).store(1);
  world.resume(0);
  rank->synchronize(rank.first);
}

// ---- The network ----

TEST(DoubleGraph, ItsExchangesMeetThoseOfTheSameTurn) {
  for (unsigned seed = 0; seed < 20; ++seed) {
    DoubleWorld world(2, seed);
    runThreads(2, [&](int index) {
      TwoStreams rank(world, index);
      const auto network = world.makeNetwork(index, {0, 1});
      std::byte* out = rank->allocate(kBytes);
      std::byte* in = rank->allocate(kBytes);
      const std::vector<DeviceNetwork::Send> sends = {{1 - index, out, kBytes}};
      const std::vector<DeviceNetwork::Receive> receives = {
          {1 - index, in, kBytes}};
      world.beginCapture(index, rank.first);
      rank->run(rank.first, [=](auto) { add(out, 1); });
      network->exchange(rank.first, sends, receives);
      const Graph graph = world.endCapture(index, rank.first);
      words(out, 100 * index);
      for (int turn = 0; turn < 6; ++turn) {
        if (turn % 3 == 2) {
          network->exchange(rank.first, sends, receives);
        } else {
          world.launch(graph, rank.first);
        }
        rank->synchronize(rank.first);
        EXPECT_TRUE(has(
            in,
            100 * (1 - index) + turn + 1 - turn / 3 - (turn % 3 == 2 ? 1 : 0)));
      }
      EXPECT_EQ(world.statistics(index).sentBytes, 6 * kBytes);
    });
    EXPECT_TRUE(world.errors().empty()) << world.errors()[0];
  }
}

TEST(DoubleGraph, ANetworkThatIsGoneFailsItsLaunch) {
  DoubleWorld world(1, 1);
  TwoStreams rank(world);
  std::byte* memory = rank->allocate(2 * kBytes);
  auto network = world.makeNetwork(0, {0});
  world.beginCapture(0, rank.first);
  const std::vector<DeviceNetwork::Send> sends = {{0, memory, kBytes}};
  const std::vector<DeviceNetwork::Receive> receives = {
      {0, memory + kBytes, kBytes}};
  network->exchange(rank.first, sends, receives);
  const Graph graph = world.endCapture(0, rank.first);
  network.reset();
  world.launch(graph, rank.first);
  EXPECT_HAS(
      deviceErrorOf([&] { rank->synchronize(rank.first); }),
      "the network of this graph was destroyed");
}

// ---- What is refused ----

/// A capture of the first stream of rank 0.
struct Capture {
  Capture()
      : world(1, 1),
        rank(world),
        event(rank->makeEvent()),
        memory(rank->allocate(kBytes)) {
    world.beginCapture(0, rank.first);
  }
  std::string end() {
    return deviceErrorOf([&] { world.endCapture(0, rank.first); });
  }
  /// All that is left is to end it, which frees its streams.
  void expectInvalid(const std::string& cause) {
    EXPECT_HAS(
        deviceErrorOf([&] { rank->clear(rank.first, memory, kBytes); }), cause);
    EXPECT_HAS(deviceErrorOf([&] { rank->record(event, rank.first); }), cause);
    EXPECT_HAS(end(), cause);
    rank->clear(rank.first, memory, kBytes);
    rank->synchronize(rank.first);
    EXPECT_EQ(memory[0], std::byte{0});
  }

  DoubleWorld world;
  TwoStreams rank;
  Device::Event event;
  std::byte* memory;
};

TEST(DoubleCapture, QueryingAnEventOfItIsRefused) {
  Capture it;
  EXPECT_TRUE(it.rank->happened(it.event));
  it.rank->record(it.event, it.rank.first);
  EXPECT_HAS(
      deviceErrorOf([&] { it.rank->happened(it.event); }),
      "the event was recorded in a capture: it cannot happen");
  it.expectInvalid("an event of it was queried");
  // Recorded anew, it is as any other; until then it is not.
  EXPECT_HAS(
      deviceErrorOf([&] { it.rank->happened(it.event); }), "cannot happen");
  it.rank->record(it.event, it.rank.first);
  it.rank->synchronize(it.rank.first);
  EXPECT_TRUE(it.rank->happened(it.event));
}

TEST(DoubleCapture, SynchronizingAStreamOfItIsRefused) {
  Capture it;
  it.rank->synchronize(it.rank.second);
  it.rank->record(it.event, it.rank.first);
  it.rank->await(it.rank.second, it.event);
  EXPECT_TRUE(it.rank->isCapturing(it.rank.second));
  EXPECT_HAS(
      deviceErrorOf([&] { it.rank->synchronize(it.rank.second); }),
      "a stream in it was synchronized");
  it.expectInvalid("a stream in it was synchronized");
  EXPECT_FALSE(it.rank->isCapturing(it.rank.second));
}

TEST(DoubleCapture, MemoryIsAllocatedButNotFreed) {
  Capture it;
  std::byte* more = it.rank->allocate(kBytes);
  std::byte* host = it.rank->allocateHost(kBytes);
  EXPECT_TRUE(it.world.errors().empty());
  it.rank->free(more);
  EXPECT_HAS(
      it.world.errors().at(0),
      "free: refused while a stream of the rank is in a capture");
  it.rank->freeHost(host);
  EXPECT_HAS(it.world.errors().at(1), "freeHost: refused");
  EXPECT_EQ(it.world.leaks(0).size(), 3u + 2u + 1u);  // all that was made
  it.expectInvalid("memory was freed during it");
  it.rank->free(more);
  it.rank->freeHost(host);
  EXPECT_EQ(it.world.errors().size(), 2u);
}

TEST(DoubleCapture, AnEventFromOutsideIsRefused) {
  Capture it;
  it.rank->await(it.rank.first, it.event);  // never recorded: nothing
  it.rank->record(it.event, it.rank.second);
  EXPECT_HAS(
      deviceErrorOf([&] { it.rank->await(it.rank.first, it.event); }),
      "recorded outside of it");
  it.expectInvalid("recorded outside of it");
}

TEST(DoubleCapture, AnEventOfAnotherCaptureIsRefused) {
  Capture it;
  it.world.beginCapture(0, it.rank.second);
  it.rank->record(it.event, it.rank.second);
  EXPECT_HAS(
      deviceErrorOf([&] { it.rank->await(it.rank.first, it.event); }),
      "awaits an event of another capture");
  EXPECT_HAS(
      deviceErrorOf([&] { it.world.endCapture(0, it.rank.second); }),
      "another capture awaits an event of it");
  it.expectInvalid("awaits an event of another capture");
}

TEST(DoubleCapture, AnEventOfOneThatHasEndedIsRefused) {
  Capture it;
  it.rank->record(it.event, it.rank.first);
  EXPECT_EQ(it.end(), "no error");
  EXPECT_HAS(
      deviceErrorOf([&] { it.rank->await(it.rank.second, it.event); }),
      "recorded in a capture that has ended");
  EXPECT_HAS(
      deviceErrorOf([&] { it.rank->happened(it.event); }), "cannot happen");
}

TEST(DoubleCapture, AStreamThatIsNotJoinedIsNamed) {
  Capture it;
  it.rank->record(it.event, it.rank.first);
  it.rank->await(it.rank.second, it.event);
  it.rank->clear(it.rank.second, it.memory, kBytes);
  EXPECT_HAS(
      it.end(),
      "the stream that began it does not await \"clear 64 bytes: device memory "
      "0 of rank 0 + 0\" of another stream");
}

TEST(DoubleCapture, StreamsBeginAndEndTheirOwn) {
  Capture it;
  EXPECT_HAS(
      deviceErrorOf([&] { it.world.beginCapture(0, it.rank.first); }),
      "stream 1 is in a capture already");
  EXPECT_HAS(
      deviceErrorOf([&] { it.world.beginCapture(0, nullptr); }),
      "the default stream cannot be captured");
  it.rank->record(it.event, it.rank.first);
  it.rank->await(it.rank.second, it.event);
  EXPECT_HAS(
      deviceErrorOf([&] { it.world.endCapture(0, it.rank.second); }),
      "stream 2 has not begun a capture");
  it.rank->destroyStream(it.rank.second);
  EXPECT_HAS(it.world.errors().at(0), "the stream is in a capture");
  EXPECT_EQ(it.end(), "no error");
}

TEST(DoubleCapture, PageableMemoryIsRefused) {
  Capture it;
  std::vector<std::byte> pageable(kBytes);
  EXPECT_HAS(
      deviceErrorOf([&] {
        it.rank->copy(it.rank.first, it.memory, pageable.data(), kBytes);
      }),
      "is read when the graph runs: use allocateHost()");
  EXPECT_EQ(it.end(), "no error");
}

TEST(DoubleCapture, AGraphDoesNotLaunchIntoIt) {
  Capture it;
  const Graph graph = it.world.endCapture(0, it.rank.first);
  it.world.beginCapture(0, it.rank.second);
  EXPECT_HAS(
      deviceErrorOf([&] { it.world.launch(graph, it.rank.second); }),
      "a graph within a capture is not modelled");
  it.world.launch(graph, it.rank.first);  // beside it
  it.rank->synchronize(it.rank.first);
  it.world.endCapture(0, it.rank.second);
}

}  // namespace
}  // namespace automoe::testing
