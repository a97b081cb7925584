// SPDX-License-Identifier: Apache-2.0
// Plans that devices make, and that go wrong: every rank hears who is at fault,
// soon, and no host and no stream waits for ever.
#include <gtest/gtest.h>

#include <atomic>
#include <stdexcept>
#include <thread>

#include "device_failures.hpp"
#include "device_plan_calls.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;

/// Without a bound the host waits for the device in the midst of a plan.
class DevicePlanFailure : public DeviceFailureTest {
 protected:
  std::unique_ptr<PlanCall> makeCall(int rank) {
    Routing routing = DeviceFailureTest::routing();
    routing.maxReceiveTokens = GetParam().bounded ? 9 : -1;
    return std::make_unique<PlanCall>(exchange(rank), routing, rank);
  }

  /// A plan before the one that goes wrong: for that one, all arenas are large
  /// enough. How many calls of the device it takes, of one rank.
  uint64_t planOnce() {
    std::atomic<uint64_t> calls{0};
    run([&](int rank) {
      const auto call = makeCall(rank);
      const uint64_t before = world().statistics(rank).enqueued;
      const auto planned = call->make(exchange(rank));
      if (rank == 2) {
        calls = world().statistics(rank).enqueued - before;
      }
      finish(engine(rank), *planned.call.operation);
    });
    world().settle();
    return calls;
  }

  /// What rank `rank` hears when it makes a plan, then waits for it.
  std::string hears(int rank, PlanCall& call) {
    return heardOf([&] {
      const auto planned = call.make(exchange(rank));
      finish(engine(rank), *planned.call.operation);
    });
  }

  /// A rank that needs nothing more of the one at fault may have its plan; it
  /// hears of it then.
  void expectHeard(int rank, PlanCall& call, const std::string& text) {
    const std::string heard = hears(rank, call);
    if (heard != "no error") {
      expectContains(heard, text);
    }
    expectContains(failureOf(rank), text);
  }

  /// A plan of all ranks, of which rank 2 fails by what `spoil` does.
  void expectNamed(
      const std::function<void(PlanCall&)>& spoil, const std::string& text) {
    run([&](int rank) {
      const auto call = makeCall(rank);
      if (rank == 2) {
        spoil(*call);
      }
      expectHeard(rank, *call, text);
      expectContains(failureOf(rank), "rank 2 aborted group world: ");
    });
  }
};

TEST_P(DevicePlanFailure, ARankThatDoesNotCallIsNamed) {
  run([&](int rank) {
    if (rank == last()) {
      return;
    }
    const auto call = makeCall(rank);
    call->timeout = kShort;
    expectContains(
        hears(rank, *call), concat("rank ", last(), " has not called it"));
  });
}

TEST_P(DevicePlanFailure, ARankThatDiesBeforeIsNamed) {
  run([&](int rank) {
    if (rank == last()) {
      std::this_thread::sleep_for(milliseconds(200));
      engine(rank).shutdown(milliseconds(0));
      return;
    }
    const auto call = makeCall(rank);
    expectContains(hears(rank, *call), concat("rank ", last()));
  });
}

/// All have agreed, and wait for what the streams of one rank do not do.
TEST_P(DevicePlanFailure, ARankThatDiesMeanwhileIsNamed) {
  const uint64_t calls = planOnce();
  world().stall(last());
  std::vector<uint64_t> before;
  for (int rank = 0; rank < size(); ++rank) {
    before.push_back(world().statistics(rank).enqueued);
  }
  const auto inTheMidst = [&](int rank) {
    return world().statistics(rank).enqueued >
           before[static_cast<size_t>(rank)] + calls / 2;
  };
  run([&](int rank) {
    std::thread killer;
    if (rank == last()) {
      killer = std::thread([&] {
        for (int each = 0; each < size(); ++each) {
          EXPECT_TRUE(eventually([&] { return inTheMidst(each); }));
        }
        engine(last()).shutdown(milliseconds(0));
      });
    }
    const auto call = makeCall(rank);
    const std::string text = hears(rank, *call);
    if (killer.joinable()) {
      killer.join();
      world().resume(rank);
    } else {
      expectContains(text, concat("rank ", last()));
    }
  });
}

TEST_P(DevicePlanFailure, ADeviceThatHangsTimesOut) {
  planOnce();
  world().stall(1);
  run([&](int rank) {
    const auto call = makeCall(rank);
    call->timeout = kShort;
    const std::string text = hears(rank, *call);
    expectContains(text, "timed out in plan on a device");
    expectContains(text, "waiting for the streams of its own device");
    if (rank == 1) {
      world().resume(rank);
    }
  });
}

TEST_P(DevicePlanFailure, EachCallThatTheDeviceRefusesIsNamed) {
  // What was measured has two calls more: of the user's own stream.
  const uint64_t calls = planOnce() - 2;
  ASSERT_GT(calls, 8U);
  const uint64_t step = size() > 4 ? 4 : 1;
  for (uint64_t at = 1; at <= calls; at += step) {
    SCOPED_TRACE("call " + std::to_string(at));
    renew();
    planOnce();
    expectNamed(
        [&](PlanCall&) {
          world().failAt(2, world().statistics(2).enqueued + 1 + at);
        },
        "as failAt() asked");
  }
}

TEST_P(DevicePlanFailure, AnErrorThatIsNoneOfOursIsNamed) {
  planOnce();
  expectNamed(
      [&](PlanCall&) {
        world().failAt(2, world().statistics(2).enqueued + 5, true);
      },
      "fails in another way");
}

TEST_P(DevicePlanFailure, WorkThatFailsOnTheDeviceIsNamed) {
  planOnce();
  run([&](int rank) {
    const auto call = makeCall(rank);
    if (rank == 2) {
      // Once its plan has begun: before, it would be the user who hears of it.
      const uint64_t before = world().statistics(rank).enqueued;
      exchange(rank).device().run(call->user(), [&, before](auto) {
        eventually([&] { return world().statistics(2).enqueued > before + 3; });
        throw DeviceError("an illegal address");
      });
    }
    const std::string text = hears(rank, *call);
    if (rank == 2 || text != "no error") {
      expectContains(text, "an illegal address");
    }
    expectContains(failureOf(rank), "rank 2");
    expectContains(failureOf(rank), "an illegal address");
  });
}

TEST_P(DevicePlanFailure, MemoryThatIsNotThereIsNamed) {
  for (const std::string method : {"allocate", "allocateHost"}) {
    SCOPED_TRACE(method);
    renew();
    expectNamed(
        [&](PlanCall&) { world().failCalls(2, method, 1); },
        method + " fails, as failCalls() asked");
  }
}

TEST_P(DevicePlanFailure, ListsThatTheUserHasNoMemoryForAreNamed) {
  planOnce();
  expectNamed(
      [](PlanCall& call) {
        call.beforeLists = [] { throw std::runtime_error("out of memory"); };
      },
      "out of memory");
}

TEST_P(DevicePlanFailure, ANetworkThatTakesNoCallIsNamed) {
  planOnce();
  expectNamed(
      [&](PlanCall&) { world().failCalls(2, "exchange", 1); },
      "exchange fails, as failCalls() asked");
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    DevicePlanFailure,
    ::testing::ValuesIn(kPlanFailureCases),
    nameOfCase);

}  // namespace
}  // namespace automoe::testing
