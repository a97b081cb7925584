// SPDX-License-Identifier: Apache-2.0
// Ranks that leave their devices and their group at unlike times: nobody fails
// who has done nothing wrong.
#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "device_graph_calls.hpp"
#include "device_ranks.hpp"
#include "process_group/common/error.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

/// Four ranks of one node, with memory that they have opened of each other.
class DeviceLeavingTest : public ::testing::Test {
 protected:
  DeviceLeavingTest() {
    const Shape shape{{kRanks}};
    for (int rank = 0; rank < kRanks; ++rank) {
      at(rank).engine = std::make_unique<Engine>(configFor(shape, rank));
      at(rank).device = world_.makeDevice(rank);
    }
    MemoryStore store;
    std::array<DeviceMemory::Offer, kRanks> offers;
    run([&](int rank) {
      Rank& own = at(rank);
      own.group =
          joinGroup(*own.engine, store, rank, kRanks, "world", seconds(30));
      own.memory =
          std::make_unique<DeviceMemory>(*own.engine, *own.group, *own.device);
      offers[static_cast<size_t>(rank)] = own.memory->offer();
    });
    run([&](int rank) { at(rank).memory->open(offers); });
  }

  static constexpr int kRanks = 4;
  struct Rank {
    std::unique_ptr<Engine> engine;
    std::unique_ptr<Device> device;
    std::shared_ptr<Group> group;
    std::unique_ptr<DeviceMemory> memory;
  };

  Rank& at(int rank) { return ranks_[static_cast<size_t>(rank)]; }
  static void run(const std::function<void(int)>& body) {
    runThreads(kRanks, body);
  }

  void expectLapse(int rank) {
    try {
      at(rank).memory->leave(milliseconds(200));
      ADD_FAILURE() << "no error";
    } catch (const TimeoutError& error) {
      expectContains(error.what(), "has waited in vain for rank ");
    }
  }

  DoubleWorld world_{kRanks, 3U};
  std::array<Rank, kRanks> ranks_;
};

TEST_F(DeviceLeavingTest, MatesThatAreLateDoNotFail) {
  expectLapse(2);
  const Routing routing = randomRouting(kRanks, 8, 2, 5, 1);
  run([&](int rank) {
    const Rank& own = at(rank);
    EXPECT_EQ(own.group->failure(), nullptr);
    EXPECT_NO_THROW(makePlan(*own.engine, *own.group, routing));
    if (rank != 2) {
      EXPECT_NO_THROW(own.memory->leave(seconds(30)));
    }
    EXPECT_EQ(own.group->failure(), nullptr);
  });
}

TEST_F(DeviceLeavingTest, MatesThatAreLaterThanTheEndOfAProcessDoNotFail) {
  expectLapse(2);
  at(2).memory.reset();
  at(2).group->leave(seconds(5));
  at(2).group.reset();
  at(2).engine.reset();
  const auto begin = steady_clock::now();
  run([&](int rank) {
    const Rank& own = at(rank);
    if (rank == 2) {
      return;
    }
    // Until the end of its process has been seen, in most runs.
    std::this_thread::sleep_for(milliseconds(200));
    EXPECT_NO_THROW(own.memory->leave(seconds(30)));
    own.group->leave(seconds(20));
    EXPECT_EQ(own.group->failure(), nullptr);
  });
  EXPECT_LT(steady_clock::now() - begin, seconds(15));
}

// ---- While graphs are replayed ----

/// A barrier of the test's own, for ranks that are threads.
class Meeting {
 public:
  explicit Meeting(int size) : size_(size) {}
  void meet() {
    const int place = arrived_.fetch_add(1);
    const int all = (place / size_ + 1) * size_;
    EXPECT_TRUE(eventually([&] { return arrived_ >= all; }));
  }

 private:
  const int size_;
  std::atomic<int> arrived_{0};
};

class ReplayLeavingTest : public ::testing::TestWithParam<Shape> {
 protected:
  static PlanResult planOf(DeviceRanks& ranks, int rank) {
    const int size = ranks.size();
    return makePlan(
        ranks.engine(rank),
        ranks.group(rank),
        randomRouting(size, 2 * size + 1, 3, 6, 1));
  }
};

TEST_P(ReplayLeavingTest, ARankThatLeavesTooEarlyIsNamed) {
  for (const int leaving : {0, 3}) {
    SCOPED_TRACE(leaving);
    DeviceRanks ranks(GetParam(), 4);
    Meeting meeting(ranks.size());
    const std::string name = "rank " + std::to_string(leaving);
    ranks.run([&](int rank) {
      auto calls =
          std::make_unique<GraphCalls>(ranks, rank, planOf(ranks, rank));
      calls->upload();
      calls->eager();
      const Graph graph = calls->capture();
      calls->replay(graph);
      calls->finish();
      meeting.meet();
      if (rank == leaving) {
        calls.reset();
        const auto begin = steady_clock::now();
        ranks.leave(rank);
        // It need not wait for the others in vain.
        EXPECT_LT(steady_clock::now() - begin, seconds(9));
        return;
      }
      ranks.world().launch(graph, calls->user());
      ranks.world().launch(graph, calls->user());
      EXPECT_NO_THROW(calls->device().synchronize(calls->user()));
      try {
        calls->eager();
        calls->finish();
        ADD_FAILURE() << "no error";
      } catch (const Error& error) {
        expectContains(error.what(), name + " has left its devices in group ");
        expectContains(error.what(), "still waited for it in a graph");
      }
    });
  }
}

TEST_P(ReplayLeavingTest, RanksThatLeaveAfterAllReplaysDoNotFail) {
  for (unsigned seed = 0; seed < 4; ++seed) {
    SCOPED_TRACE(seed);
    DeviceRanks ranks(GetParam(), seed);
    Meeting meeting(ranks.size());
    ranks.run([&](int rank) {
      auto calls =
          std::make_unique<GraphCalls>(ranks, rank, planOf(ranks, rank));
      calls->upload();
      const Graph graph = calls->capture();
      meeting.meet();
      for (int replay = 0; replay < 3; ++replay) {
        calls->replay(graph);
      }
      if (rank != 1) {
        // Long enough for rank 1 to have left, in most runs.
        std::this_thread::sleep_for(milliseconds(100));
      }
      calls->finish();
      calls.reset();
      ranks.leave(rank);
      EXPECT_EQ(ranks.group(rank).failure(), nullptr);
    });
    ranks.expectNoErrors();
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, ReplayLeavingTest, ::testing::Values(Shape{{4}}, Shape{{2, 2}}));

}  // namespace
}  // namespace automoe::testing
