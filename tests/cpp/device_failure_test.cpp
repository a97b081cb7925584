// SPDX-License-Identifier: Apache-2.0
// Calls on devices that go wrong: every rank hears who is at fault, no stream
// waits for ever, and the caller's memory is let go.
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "device_failures.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;

/// Dispatches and combines by a plan in which all have rows for all.
class DeviceFailure : public DeviceFailureTest {
 protected:
  void SetUp() override {
    plans_.resize(static_cast<size_t>(size()));
    run([&](int rank) {
      plans_[static_cast<size_t>(rank)] =
          makePlan(engine(rank), group(rank), routing());
    });
  }

  std::unique_ptr<TwinCall> makeCall(int rank, DeviceCase it = {}) {
    return std::make_unique<TwinCall>(
        exchange(rank), plans_[static_cast<size_t>(rank)], it);
  }

  /// What rank `rank` hears when it makes the calls, then waits for them.
  std::string hears(
      int rank, TwinCall& call, const std::function<void()>& posted = [] {}) {
    return heardOf([&] {
      call.enqueue(exchange(rank));
      posted();
      for (const auto& made : call.calls) {
        finish(engine(rank), *made.operation);
      }
    });
  }
  /// The same of one dispatch.
  std::string hears(int rank, TwinCall& call, DeviceExchange::Terms terms) {
    return heardOf([&] {
      const auto made = call.dispatchOnce(exchange(rank), std::move(terms));
      finish(engine(rank), *made.operation);
    });
  }
  void expectThrough(int rank, const TwinCall& call) {
    DeviceFailureTest::expectThrough(rank, call.calls);
  }

  std::vector<PlanResult> plans_;
};

TEST_P(DeviceFailure, RowsThatDoNotAgreeAreNamed) {
  run([&](int rank) {
    const auto call = makeCall(rank, {.elements = rank == 2 ? 16U : 8U});
    expectContains(hears(rank, *call), "bytes in a row: ");
    expectThrough(rank, *call);
  });
}

TEST_P(DeviceFailure, OtherCallsAreNamed) {
  run([&](int rank) {
    const auto call = makeCall(rank);
    if (rank != 1) {
      expectContains(hears(rank, *call), "dispatch on a device");
      expectThrough(rank, *call);
      return;
    }
    // The same on the CPU, where all the others are on their devices.
    try {
      call->runOnCpu(engine(rank), group(rank));
      ADD_FAILURE() << "no error";
    } catch (const InvalidArgument& error) {
      expectContains(error.what(), "dispatch on rank 1");
    }
  });
}

TEST_P(DeviceFailure, ARankThatDoesNotCallIsNamed) {
  std::atomic<int> posted{0};
  run([&](int rank) {
    if (rank == last()) {
      return;
    }
    const auto call = makeCall(rank);
    if (rank == 0) {
      // It gives up first; then all others have called.
      call->timeout = kShort;
      EXPECT_TRUE(eventually([&] { return posted >= size() - 2; }));
    }
    expectContains(
        hears(rank, *call, [&] { posted += 1; }),
        concat("ranks that have not posted it: ", last()));
    expectThrough(rank, *call);
  });
}

TEST_P(DeviceFailure, ARankThatDiesIsNamed) {
  run([&](int rank) {
    if (rank == last()) {
      // Long enough for the others to have enqueued, in most runs.
      std::this_thread::sleep_for(milliseconds(200));
      engine(rank).shutdown(milliseconds(0));
      return;
    }
    const auto call = makeCall(rank);
    expectContains(hears(rank, *call), concat("rank ", last()));
    expectThrough(rank, *call);
  });
}

TEST_P(DeviceFailure, ADeviceThatFailsIsNamed) {
  run([&](int rank) {
    const auto call = makeCall(rank);
    if (rank == 2) {
      const auto made = world().statistics(rank).enqueued;
      world().failAt(rank, made + 12);
    }
    const std::string text = hears(rank, *call);
    expectContains(text, "as failAt() asked");
    expectThrough(rank, *call);
  });
}

TEST_P(DeviceFailure, AnErrorThatIsNoneOfOursIsNamed) {
  run([&](int rank) {
    const auto call = makeCall(rank);
    if (rank == 1) {
      const auto made = world().statistics(rank).enqueued;
      world().failAt(rank, made + 12, true);
    }
    expectContains(hears(rank, *call), "fails in another way");
    expectThrough(rank, *call);
  });
}

TEST_P(DeviceFailure, WorkThatFailsOnTheDeviceIsNamed) {
  std::atomic<int> posted{0};
  run([&](int rank) {
    const auto call = makeCall(rank);
    DeviceExchange::Terms terms;
    terms.timeout = kTimeout;
    if (rank == 2) {
      // Nothing runs before all of it is enqueued, so no call throws.
      world().stall(rank);
      terms.after = call->enqueueBroken();
    }
    const auto made = call->dispatchOnce(exchange(rank), terms);
    posted += 1;
    if (rank == 2) {
      // A group that has failed takes no calls.
      EXPECT_TRUE(eventually([&] { return posted >= size(); }));
      world().resume(rank);
    }
    const std::string text =
        heardOf([&] { finish(engine(rank), *made.operation); });
    // Others may have had what they need from it before.
    if (rank == 2 || text != "no error") {
      expectContains(text, "rank 2, dispatch on a device number ");
      expectContains(text, "an illegal address");
    }
    expectContains(failureOf(rank), "an illegal address");
  });
}

TEST_P(DeviceFailure, ADeviceThatHangsTimesOut) {
  world().stall(1);
  run([&](int rank) {
    const auto call = makeCall(rank);
    call->timeout = kShort;
    const std::string text = hears(rank, *call);
    expectContains(text, "timed out in");
    expectContains(text, "waiting for the streams of its own device");
    if (rank == 1) {
      world().resume(1);
    }
    expectThrough(rank, *call);
  });
}

TEST_P(DeviceFailure, CapturedHereAndEagerThereIsNamed) {
  run([&](int rank) {
    const auto call = makeCall(rank);
    world().setCapturing(rank, rank == 1);
    const std::string text = hears(rank, *call);
    world().setCapturing(rank, false);
    expectContains(text, "rank 1 captures this call into a graph, rank ");
    expectContains(text, " does not; all ranks must capture the same calls");
    expectThrough(rank, *call);
  });
}

TEST_P(DeviceFailure, FencedHereOnlyIsNamed) {
  run([&](int rank) {
    const auto call = makeCall(rank);
    DeviceExchange::Terms terms;
    terms.timeout = kTimeout;
    terms.fenced = rank == 2;
    expectContains(hears(rank, *call, terms), "has fenced: ");
    expectThrough(rank, *call);
  });
}

/// What a graph does is not seen by the host: no call is pending when a rank
/// fails.
TEST_P(DeviceFailure, AFailureLetsGraphsGo) {
  std::atomic<int> ready{0};
  std::atomic<int> ended{0};
  run([&](int rank) {
    const auto call = makeCall(rank);
    world().settle();  // the lists are there
    if (rank == last()) {
      world().stall(rank);
    }
    ready += 1;
    EXPECT_TRUE(eventually([&] { return ready >= size(); }));
    world().setCapturing(rank, true);
    DeviceExchange::Terms terms;
    terms.timeout = kTimeout;
    const auto made = call->dispatchOnce(exchange(rank), terms);
    world().setCapturing(rank, false);
    finish(engine(rank), *made.operation);
    ended += 1;
    EXPECT_TRUE(eventually([&] { return ended >= size(); }));
    if (rank == last()) {
      group(rank).abort("the test says so");
    } else {
      expectThrough(rank, *call);
      ended += 1;
    }
    EXPECT_TRUE(eventually([&] { return ended >= 2 * size() - 1; }));
    world().resume(last());
    expectThrough(rank, *call);
  });
}

TEST_P(DeviceFailure, MemoryIsLetGoOnceTheStreamsAreThrough) {
  world().stall(0);
  std::atomic<int> posted{0};
  std::atomic<int> finished{0};
  const auto untilAll = [&](const std::atomic<int>& count) {
    EXPECT_TRUE(eventually([&] { return count >= size(); }));
  };
  run([&](int rank) {
    const auto call = makeCall(rank);
    std::atomic<bool> released{false};
    DeviceExchange::Terms terms;
    terms.timeout = kTimeout;
    terms.callbacks.released = [&] { released = true; };
    const auto made = call->dispatchOnce(exchange(rank), terms);
    posted += 1;
    if (rank == last()) {
      untilAll(posted);
      group(rank).abort("the test says so");
    }
    EXPECT_THROW(finish(engine(rank), *made.operation), Error);
    finished += 1;
    if (rank == 0) {
      untilAll(finished);
      // Its device may still read it.
      std::this_thread::sleep_for(milliseconds(50));
      EXPECT_FALSE(released);
      world().resume(0);
    }
    EXPECT_TRUE(eventually([&] { return released.load(); }));
    expectThrough(rank, *call);
  });
}

TEST_P(DeviceFailure, ANetworkThatTakesNoCallIsNamed) {
  world().failCalls(1, "exchange", 1);
  run([&](int rank) {
    const auto call = makeCall(rank);
    const std::string text = hears(rank, *call);
    expectContains(text, "rank 1");
    expectContains(text, "exchange fails, as failCalls() asked");
    expectThrough(rank, *call);
  });
}

TEST_P(DeviceFailure, NoMemoryForAnArenaIsNamed) {
  // The device has no hook that makes room.
  world().failCalls(1, "allocateShared", 1);
  run([&](int rank) {
    const auto call = makeCall(rank, {.elements = 1 << 16});
    const std::string text = hears(rank, *call);
    expectContains(text, "rank 1");
    expectContains(text, "allocateShared fails, as failCalls() asked");
    expectThrough(rank, *call);
  });
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    DeviceFailure,
    ::testing::Values(FailureCase{kTwoNodes}, FailureCase{kFourNodes}),
    nameOfCase);

}  // namespace
}  // namespace automoe::testing
