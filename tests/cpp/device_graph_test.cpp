// SPDX-License-Identifier: Apache-2.0
// Dispatch and combine captured into graphs of devices: every replay against
// the CPU, between other calls, on doubles that run work in any legal order.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "device_graph_calls.hpp"
#include "process_group/common/error.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;

Routing routingFor(int size, unsigned seed) {
  return randomRouting(size, 2 * size + 1, 3, 6, seed);
}

/// Runs `body` on all ranks of as many worlds as there are ways to choose.
void inManyOrders(
    const Shape& shape,
    const std::function<void(DeviceRanks&, int rank)>& body) {
  constexpr unsigned kOrders = 6;
  for (unsigned seed = 0; seed < kOrders; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    DeviceRanks ranks(shape, seed);
    ranks.run([&](int rank) { body(ranks, rank); });
    ranks.expectNoErrors();
  }
}

PlanResult planOf(DeviceRanks& ranks, int rank, unsigned seed) {
  return makePlan(
      ranks.engine(rank), ranks.group(rank), routingFor(ranks.size(), seed));
}

class DeviceGraphTest : public ::testing::TestWithParam<Shape> {};

TEST_P(DeviceGraphTest, NewInputsAtEachReplay) {
  inManyOrders(GetParam(), [](DeviceRanks& ranks, int rank) {
    GraphCalls calls(ranks, rank, planOf(ranks, rank, 1));
    calls.upload();
    calls.eager();
    calls.finish();
    const Graph graph = calls.capture();
    const auto before = ranks.world().statistics(rank);
    for (int replay = 0; replay < 5; ++replay) {
      calls.replay(graph);
    }
    const auto after = ranks.world().statistics(rank);
    EXPECT_EQ(after.synchronized, before.synchronized);
    calls.finish();
  });
}

// An odd number of calls before a replay leaves the arenas the other way round.
TEST_P(DeviceGraphTest, BetweenEagerCalls) {
  inManyOrders(GetParam(), [](DeviceRanks& ranks, int rank) {
    GraphCalls calls(ranks, rank, planOf(ranks, rank, 2));
    calls.upload();
    calls.eager();
    calls.finish();
    const Graph graph = calls.capture();
    calls.play("rerdrdddrredrdr", graph);
    calls.finish();
  });
}

TEST_P(DeviceGraphTest, CapturedAfterAnOddNumberOfCalls) {
  inManyOrders(GetParam(), [](DeviceRanks& ranks, int rank) {
    GraphCalls calls(ranks, rank, planOf(ranks, rank, 3));
    calls.upload();
    calls.dispatchAlone();
    calls.finish();
    const Graph once = calls.capture();
    // Three calls in one graph.
    const Graph twice = calls.capture([&] {
      calls.dispatch();
      calls.enqueue();
    });
    for (const char step : std::string("1221d21d1d2e1")) {
      if (step == 'd') {
        calls.dispatchAlone();
      } else if (step == 'e') {
        calls.eager();
      } else {
        calls.replay(step == '1' ? once : twice);
      }
    }
    calls.finish();
  });
}

TEST_P(DeviceGraphTest, EagerCallsAfterACaptureThatIsNotReplayedYet) {
  inManyOrders(GetParam(), [](DeviceRanks& ranks, int rank) {
    GraphCalls calls(ranks, rank, planOf(ranks, rank, 7));
    calls.upload();
    calls.eager();
    calls.finish();
    calls.dispatchAlone();
    // Three calls: what comes next has the arena of the last eager one.
    const Graph graph = calls.capture([&] {
      calls.dispatch();
      calls.enqueue();
    });
    calls.play("dddrdd", graph);
    calls.finish();
  });
}

TEST_P(DeviceGraphTest, SeventyOtherPlansBetween) {
  inManyOrders(GetParam(), [](DeviceRanks& ranks, int rank) {
    const PlanResult plan = planOf(ranks, rank, 4);
    GraphCalls calls(ranks, rank, plan);
    calls.upload();
    calls.eager();
    calls.finish();
    const Graph graph = calls.capture();
    calls.finish();
    calls.forgetLists();
    GraphCalls others(ranks, rank, planOf(ranks, rank, 5));
    for (int other = 0; other < 70; ++other) {
      others.upload();
      if (other % 30 == 0) {
        others.eager();
        others.finish();
      }
      if (other % 35 == 0) {
        calls.replay(graph);
        calls.finish();
      }
    }
    others.finish();
    calls.replay(graph);
    calls.finish();
  });
}

TEST_P(DeviceGraphTest, APlanThatIsNewWithinACapture) {
  inManyOrders(GetParam(), [](DeviceRanks& ranks, int rank) {
    GraphCalls calls(ranks, rank, planOf(ranks, rank, 6));
    calls.upload();
    calls.eager();
    calls.finish();
    const Graph graph = calls.capture([&] {
      calls.dispatch();
      calls.upload();
      calls.enqueue();
    });
    calls.replay(graph);
    calls.replay(graph);
    calls.upload();  // others can still be
    calls.eager();
    calls.replay(graph);
    calls.finish();
  });
}

// Its lists are on their way to the device when the graph is launched.
TEST_P(DeviceGraphTest, APlanThatIsNewWhereACaptureBegins) {
  inManyOrders(GetParam(), [](DeviceRanks& ranks, int rank) {
    GraphCalls calls(ranks, rank, planOf(ranks, rank, 7));
    ranks.world().stall(rank);
    std::thread later([&] {
      std::this_thread::sleep_for(milliseconds(300));
      ranks.world().resume(rank);
    });
    const Graph graph = calls.capture([&] {
      calls.upload();
      calls.enqueue();
    });
    calls.replay(graph);
    later.join();
    calls.replay(graph);
    calls.finish();
  });
}

// The arenas of the first one are not those of the second, which are larger.
TEST_P(DeviceGraphTest, TwoGraphsOfUnlikeSize) {
  DeviceRanks ranks(GetParam(), 8);
  ranks.run([&](int rank) {
    const int size = ranks.size();
    const PlanResult plan = makePlan(
        ranks.engine(rank),
        ranks.group(rank),
        randomRouting(size, 2 * size, 4, 60, 8));
    GraphCalls small(ranks, rank, plan);
    GraphCalls large(ranks, rank, plan, {.h = 5000});
    small.upload();
    small.eager();
    small.finish();
    const Graph first = small.capture();
    large.upload();
    const Graph second = large.capture();
    for (int turn = 0; turn < 3; ++turn) {
      small.replay(first);
      small.finish();
      large.replay(second);
      large.finish();
    }
  });
  ranks.expectNoErrors();
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, DeviceGraphTest, ::testing::Values(Shape{{4}}, Shape{{2, 2}}));

// ---- Other ways of the rows ----

/// Replays between other calls, with rows of more and of less than a scale.
void replayOtherWays(
    const Shape& shape,
    unsigned seed,
    DeviceWire wire,
    const std::function<void(DeviceRanks&, int rank)>& beforeCapture) {
  SCOPED_TRACE("seed " + std::to_string(seed));
  DeviceRanks ranks(shape, seed);
  ranks.run([&](int rank) {
    const GraphCase it = {.h = seed % 2 == 0 ? 6U : 140U, .wire = wire};
    GraphCalls calls(ranks, rank, planOf(ranks, rank, seed), it);
    calls.upload();
    calls.eager();
    calls.finish();
    beforeCapture(ranks, rank);
    const Graph graph = calls.capture();
    calls.play("rrdrerddr", graph);
    calls.finish();
  });
  ranks.expectNoErrors();
}

class DeviceGraphWaysTest : public ::testing::TestWithParam<Shape> {};

TEST_P(DeviceGraphWaysTest, RowsAsEightBitFloats) {
  for (const unsigned seed : {21U, 22U, 23U}) {
    replayOtherWays(
        GetParam(), seed, DeviceWire::kFp8, [](DeviceRanks&, int) {});
  }
}

// The first captured call is the first that reads that way, so its scratch
// memory grows within the capture.
TEST_P(DeviceGraphWaysTest, RowsByCopyEngines) {
  for (const unsigned seed : {31U, 32U, 33U}) {
    const auto wire = seed == 31 ? DeviceWire::kAsIs : DeviceWire::kFp8;
    replayOtherWays(GetParam(), seed, wire, [](DeviceRanks& ranks, int rank) {
      const int mates = ranks.group(rank).topology().localSize();
      ranks.exchange(rank).setReadRates(freeCopies(mates));
    });
  }
}

// A graph keeps the way it was captured with.
TEST_P(DeviceGraphWaysTest, CopiesAreReplayedThoughRatesChange) {
  DeviceRanks ranks(GetParam(), 41);
  ranks.run([&](int rank) {
    DeviceExchange& exchange = ranks.exchange(rank);
    const PlanResult plan = planOf(ranks, rank, 41);
    GraphCalls calls(ranks, rank, plan);
    calls.upload();
    calls.eager();
    calls.finish();
    const Topology& topology = ranks.group(rank).topology();
    const auto copied = [&](const Graph& graph) {
      const uint64_t before = ranks.world().statistics(rank).copiedBytes;
      calls.replay(graph);
      calls.finish();
      return ranks.world().statistics(rank).copiedBytes - before;
    };
    const Graph byKernels = calls.capture();
    exchange.setReadRates(freeCopies(topology.localSize()));
    const Graph byEngines = calls.capture();
    bool reads = false;
    const RouteLists lists = makeRouteLists(Route(plan.route), topology);
    for (int local = 0; local < topology.localSize(); ++local) {
      reads = reads || (local != topology.localRank() &&
                        lists.receivedFrom[static_cast<size_t>(local)] > 0);
    }
    const uint64_t few = copied(byKernels);
    const uint64_t more = copied(byEngines);
    EXPECT_EQ(more > few, reads) << "rank " << rank;
    exchange.setReadRates({});
    EXPECT_EQ(copied(byEngines), more) << "rank " << rank;
    EXPECT_EQ(copied(byKernels), few) << "rank " << rank;
  });
  ranks.expectNoErrors();
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    DeviceGraphWaysTest,
    ::testing::Values(Shape{{2, 2}}, Shape{{2, 2, 2, 2}}));

// ---- Failures ----

TEST(DeviceGraph, ARankThatDoesNotCaptureIsNamed) {
  for (const int odd : {0, 3}) {
    DeviceRanks ranks(Shape{{2, 2}}, 9);
    // Before any rank goes on: it would fail the plan of others.
    std::vector<PlanResult> plans(4);
    ranks.run([&](int rank) {
      plans[static_cast<size_t>(rank)] = planOf(ranks, rank, 1);
    });
    ranks.run([&](int rank) {
      GraphCalls calls(ranks, rank, plans[static_cast<size_t>(rank)]);
      calls.upload();
      std::string text = "no error";
      try {
        if (rank == odd) {
          calls.enqueue();
        } else {
          calls.capture();
        }
        calls.finish();
      } catch (const Error& error) {
        text = error.what();
      }
      expectContains(text, "captures this call into a graph, rank ");
      expectContains(text, " does not");
      EXPECT_NO_THROW(calls.device().synchronize(calls.user()));
    });
  }
}

TEST(DeviceGraph, ARankLostDuringReplaysLetsTheOthersGo) {
  DeviceRanks ranks(Shape{{2, 2}}, 10);
  std::atomic<int> ready{0};
  ranks.run([&](int rank) {
    GraphCalls calls(ranks, rank, planOf(ranks, rank, 2));
    calls.upload();
    calls.eager();
    const Graph graph = calls.capture();
    calls.replay(graph);
    calls.finish();
    ready += 1;
    EXPECT_TRUE(eventually([&] { return ready == ranks.size(); }));
    if (rank == 3) {
      // Long enough for the others to wait for its replay, in most runs.
      std::this_thread::sleep_for(milliseconds(200));
      // Something is pending, so it does not say goodbye.
      std::byte never = {};
      PairArguments mail;
      mail.peer = 0;
      mail.data = &never;
      mail.bytes = 1;
      const auto pending =
          ranks.group(3).receive(mail, std::chrono::seconds(30), {});
      ranks.engine(3).shutdown(milliseconds(0));
      EXPECT_NE(pending->error(), nullptr);
      return;
    }
    ranks.world().launch(graph, calls.user());
    ranks.world().launch(graph, calls.user());
    EXPECT_NO_THROW(calls.device().synchronize(calls.user()));
    try {
      calls.eager();
      calls.finish();
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      expectContains(error.what(), "rank 3");
    }
  });
}

}  // namespace
}  // namespace automoe::testing
