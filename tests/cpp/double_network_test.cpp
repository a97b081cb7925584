// SPDX-License-Identifier: Apache-2.0
// The test double of DeviceNetwork keeps NCCL's rules, the ones that hang too.
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/double_calls.hpp"
#include "ranks.hpp"

namespace automoe::testing {
namespace {

using Sends = std::vector<DeviceNetwork::Send>;
using Receives = std::vector<DeviceNetwork::Receive>;

std::vector<int> firstRanks(int size) {
  std::vector<int> ranks(static_cast<size_t>(size));
  std::iota(ranks.begin(), ranks.end(), 0);
  return ranks;
}

/// All ranks of a world in one thread, with memory and a network each.
struct NetworkRanks {
  NetworkRanks(DoubleWorld& world, int size) {
    for (int rank = 0; rank < size; ++rank) {
      ranks.push_back(std::make_unique<TwoStreams>(world, rank));
      networks.push_back(world.makeNetwork(rank, firstRanks(size)));
      memory.push_back(at(rank)->allocate(2 * kBytes));
      words(memory.back(), rank);
    }
    world.setPatience(std::chrono::milliseconds(50));
  }
  TwoStreams& at(int rank) { return *ranks[static_cast<size_t>(rank)]; }
  std::byte* in(int rank) { return memory[static_cast<size_t>(rank)]; }
  std::byte* out(int rank) { return in(rank) + kBytes; }
  DeviceNetwork& network(int rank) {
    return *networks[static_cast<size_t>(rank)];
  }
  void send(int rank, int peer, size_t bytes = kBytes) {
    network(rank).exchange(at(rank).first, Sends{{peer, in(rank), bytes}}, {});
  }
  void receive(int rank, int peer, size_t bytes = kBytes) {
    network(rank).exchange(
        at(rank).first, {}, Receives{{peer, out(rank), bytes}});
  }
  std::string wait(int rank) {
    return deviceErrorOf([&] { at(rank)->synchronize(at(rank).first); });
  }

  std::vector<std::unique_ptr<TwoStreams>> ranks;
  std::vector<std::unique_ptr<DeviceNetwork>> networks;
  std::vector<std::byte*> memory;
};

// An all-to-all from and into buffers that other streams fill and read.
// Returns whether the right bytes came out, with or without the events.
bool allToAll(unsigned seed, bool orders) {
  constexpr int kSize = 3;
  DoubleWorld world(kSize, seed);
  std::vector<int> right(kSize, 0);
  runThreads(kSize, [&](int index) {
    TwoStreams rank(world, index);
    const auto network = world.makeNetwork(index, firstRanks(kSize));
    std::byte* in = rank->allocate(kSize * kBytes);
    std::byte* out = rank->allocate(kSize * kBytes);
    std::byte* result = rank->allocateHost(kSize * kBytes);
    const auto event = rank->makeEvent();
    const auto order = [&](Device::Stream from, Device::Stream to) {
      if (orders) {
        rank->record(event, from);
        rank->await(to, event);
      }
    };
    rank->run(rank.first, [=](kernels::DeviceStream) {
      for (int peer = 0; peer < kSize; ++peer) {
        words(in + static_cast<size_t>(peer) * kBytes, 10 * index + peer);
      }
    });
    order(rank.first, rank.second);
    Sends sends;
    Receives receives;
    for (int peer = 0; peer < kSize; ++peer) {
      const auto offset = static_cast<size_t>(peer) * kBytes;
      sends.push_back({peer, in + offset, kBytes});
      receives.push_back({peer, out + offset, kBytes});
    }
    network->exchange(rank.second, sends, receives);
    order(rank.second, rank.first);
    rank->copy(rank.first, result, out, kSize * kBytes);
    rank->synchronize(rank.first);
    bool all = true;
    for (int peer = 0; peer < kSize; ++peer) {
      all &=
          has(result + static_cast<size_t>(peer) * kBytes, 10 * peer + index);
    }
    right[static_cast<size_t>(index)] = all ? 1 : 0;
    rank->synchronize(rank.second);
    rank->free(in);
    rank->free(out);
    rank->freeHost(result);
    rank->destroyEvent(event);
  });
  EXPECT_TRUE(world.errors().empty()) << world.errors()[0];
  EXPECT_EQ(world.statistics(0).sentBytes, kSize * kBytes);
  return right == std::vector<int>(kSize, 1);
}

TEST(DoubleNetwork, MovesBytesInAnyLegalOrder) {
  int unordered = 0;
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    ASSERT_TRUE(allToAll(seed, true)) << seed;
  }
  for (unsigned seed = 0; seed < kFewSeeds; ++seed) {
    unordered += allToAll(seed, false) ? 1 : 0;
  }
  EXPECT_LT(unordered, 30);
}

TEST(DoubleNetwork, MatchesThePairsTransfersInOrder) {
  for (unsigned seed = 0; seed < 20; ++seed) {
    DoubleWorld world(2, seed);
    NetworkRanks ranks(world, 2);
    words(ranks.out(0), 50);
    ranks.network(0).exchange(
        ranks.at(0).first,
        Sends{{1, ranks.in(0), kBytes}, {1, ranks.out(0), kBytes}},
        {});
    ranks.receive(1, 0);
    ranks.network(1).exchange(
        ranks.at(1).second, {}, Receives{{0, ranks.in(1), kBytes}});
    EXPECT_EQ(ranks.wait(0), "no error");
    world.settle();
    EXPECT_TRUE(has(ranks.out(1), 0));
    EXPECT_TRUE(has(ranks.in(1), 50));
  }
}

TEST(DoubleNetwork, ASendBlocksItsStreamUntilItIsReceived) {
  DoubleWorld world(2, 0);
  NetworkRanks ranks(world, 2);
  ranks.send(0, 1);
  ranks.receive(0, 1);
  ranks.send(1, 0);
  ranks.receive(1, 0);  // each sends before it receives: NCCL hangs
  EXPECT_HAS(
      ranks.wait(0),
      "stream 2: exchange, transfer 0 from rank 0 to rank 1 of the group (the "
      "receive does not run), then 1 more; rank 1, stream 4: exchange, "
      "transfer "
      "0 from rank 1 to rank 0 of the group (the receive does not run)");
  EXPECT_FALSE(world.deadlocked().empty());
  ranks.network(0).abort();
  ranks.network(1).abort();
}

TEST(DoubleNetwork, ItsExchangesRunInOrderOnAnyStreams) {
  DoubleWorld world(2, 0);
  NetworkRanks ranks(world, 2);
  ranks.send(0, 1);  // waits for a receive that waits for the second stream
  ranks.network(0).exchange(
      ranks.at(0).second, {}, Receives{{1, ranks.out(0), kBytes}});
  ranks.send(1, 0);
  ranks.receive(1, 0);
  EXPECT_HAS(
      deviceErrorOf([&] { ranks.at(0)->synchronize(ranks.at(0).second); }),
      "transfer 0 from rank 1 to rank 0 of the group (the receive does not "
      "run)");
  ranks.network(0).abort();
  ranks.network(1).abort();
}

TEST(DoubleNetwork, WaitsForARankThatIsLate) {
  DoubleWorld world(2, 0);
  NetworkRanks ranks(world, 2);
  ranks.receive(1, 0);
  world.settle();
  EXPECT_HAS(world.deadlocked(), "(no send)");
  world.stall(0);
  ranks.send(0, 1);
  EXPECT_HAS(ranks.wait(1), "(the send does not run)");
  world.resume(0);
  EXPECT_EQ(ranks.wait(1), "no error");
  EXPECT_TRUE(has(ranks.out(1), 0));
}

TEST(DoubleNetwork, SizesThatDifferAreAFailureAndBlock) {
  DoubleWorld world(2, 0);
  NetworkRanks ranks(world, 2);
  EXPECT_EQ(ranks.network(0).failure(), "");
  ranks.send(0, 1, kBytes / 2);
  ranks.receive(1, 0);
  for (int rank : {0, 1}) {
    EXPECT_EQ(
        ranks.network(rank).failure(),
        "transfer 0 from rank 0 to rank 1: 32 bytes are sent, 64 received");
    EXPECT_HAS(ranks.wait(rank), "of the group (broken)");
  }
  ranks.network(0).abort();
  EXPECT_EQ(ranks.wait(0), "no error");
  EXPECT_HAS(ranks.wait(1), "(broken)");  // its own abort is missing
  ranks.network(1).abort();
  EXPECT_EQ(ranks.wait(1), "no error");
  EXPECT_EQ(ranks.out(1)[0], ranks.out(0)[0]) << "poisoned still";
  EXPECT_HAS(
      deviceErrorOf([&] { ranks.send(0, 1); }),
      "exchange: the network was aborted");
}

TEST(DoubleNetwork, RefusesPeersAndMemoryThatItCannotUse) {
  DoubleWorld world(2, 0);
  NetworkRanks ranks(world, 2);
  std::vector<std::byte> host(kBytes);
  const auto send = [&](int peer, const std::byte* data) {
    return deviceErrorOf([&] {
      ranks.network(0).exchange(
          ranks.at(0).first, Sends{{peer, data, kBytes}}, {});
    });
  };
  EXPECT_HAS(send(2, ranks.in(0)), "peer 2 is not in the group of 2 ranks");
  EXPECT_HAS(send(-1, ranks.in(0)), "peer -1 is not");
  EXPECT_HAS(send(1, ranks.in(1)), "is not open in rank 0");
  EXPECT_HAS(send(1, host.data()), "is not memory of the device");
  world.failAt(0, world.statistics(0).enqueued + 1);
  EXPECT_HAS(send(1, ranks.in(0)), "exchange: call 5 fails");
  ranks.network(0).exchange(ranks.at(0).first, Sends{{1, nullptr, 0}}, {});
  EXPECT_EQ(ranks.wait(0), "no error");  // nothing is on its way
  EXPECT_EQ(world.statistics(0).items, 0u);
}

TEST(DoubleNetwork, MemoryThatIsFreedTooEarlyIsAnError) {
  DoubleWorld world(2, 0);
  NetworkRanks ranks(world, 2);
  ranks.send(0, 1);
  ranks.at(0)->free(ranks.in(0));  // gives up: nobody receives
  EXPECT_HAS(world.errors().at(0), "free does not wait longer");
  ranks.receive(1, 0);
  world.settle();
  EXPECT_HAS(
      world.errors().at(1), "rank 0: exchange: device memory 0 of rank 0");
  EXPECT_HAS(ranks.network(1).failure(), "memory is gone");
  EXPECT_HAS(ranks.wait(0), "work failed before");
  ranks.network(0).abort();
  ranks.network(1).abort();
}

TEST(DoubleNetwork, GroupsAndTheirSuccessorsDoNotMeet) {
  DoubleWorld world(3, 0);
  NetworkRanks ranks(world, 3);
  const std::vector<int> group = {2, 0};
  const auto late = world.makeNetwork(0, group);
  const auto later = world.makeNetwork(0, group);
  const auto peer = world.makeNetwork(2, group);
  later->exchange(ranks.at(0).second, {}, Receives{{0, ranks.in(0), kBytes}});
  late->exchange(ranks.at(0).first, {}, Receives{{0, ranks.out(0), kBytes}});
  peer->exchange(ranks.at(2).first, Sends{{1, ranks.in(2), kBytes}}, {});
  EXPECT_EQ(ranks.wait(0), "no error");
  EXPECT_TRUE(has(ranks.out(0), 2));
  EXPECT_TRUE(has(ranks.in(0), 0)) << "nothing for the second network";
  later->abort();
}

TEST(DoubleNetwork, MustNotGoWithWorkUnderWay) {
  DoubleWorld world(2, 0);
  NetworkRanks ranks(world, 2);
  ranks.send(0, 1);
  ranks.networks[0] = nullptr;
  EXPECT_HAS(world.errors().at(0), "1 exchanges are under way");
  EXPECT_EQ(ranks.wait(0), "no error");
}

}  // namespace
}  // namespace automoe::testing
