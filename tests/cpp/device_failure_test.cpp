// SPDX-License-Identifier: Apache-2.0
// Calls on devices that go wrong: every rank hears who is at fault, no stream
// waits for ever, and the caller's memory is let go.
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "device_ranks.hpp"
#include "process_group/common/error.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

/// Two nodes of two ranks, and a plan in which all have rows for all.
class DeviceFailure : public ::testing::Test {
 protected:
  DeviceFailure() : ranks_(Shape{{2, 2}}, 5) {
    plans_.resize(4);
    ranks_.run([&](int rank) {
      plans_[static_cast<size_t>(rank)] =
          makePlan(ranks_.engine(rank), ranks_.group(rank), routing_);
    });
  }

  std::unique_ptr<TwinCall> makeCall(int rank, DeviceCase it = {}) {
    return std::make_unique<TwinCall>(
        ranks_.exchange(rank), plans_[static_cast<size_t>(rank)], it);
  }

  /// What rank `rank` hears when it makes the calls `body` makes, then waits
  /// for them.
  std::string hears(int rank, TwinCall& call) {
    try {
      call.enqueue(ranks_.exchange(rank));
      for (const auto& made : call.calls) {
        finish(ranks_.engine(rank), *made.operation);
      }
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }

  /// All devices come to the end of what they have, whatever has failed.
  void expectThrough(int rank, TwinCall& call) {
    const auto limit = std::chrono::steady_clock::now() + seconds(20);
    for (const auto& made : call.calls) {
      bool happened = false;
      while (!happened && std::chrono::steady_clock::now() < limit) {
        happened = ranks_.exchange(rank).device().happened(made.done->get());
        std::this_thread::sleep_for(milliseconds(1));
      }
      EXPECT_TRUE(happened) << "rank " << rank;
    }
  }

  Routing routing_ = [] {
    Routing routing{.numExperts = 8, .topK = 8};
    for (int rank = 0; rank < 4; ++rank) {
      routing.ids.emplace_back();
      for (int i = 0; i < 24; ++i) {
        routing.ids.back().push_back(i % 8);
      }
    }
    return routing;
  }();
  DeviceRanks ranks_;
  std::vector<PlanResult> plans_;
};

TEST_F(DeviceFailure, RowsThatDoNotAgreeAreNamed) {
  ranks_.run([&](int rank) {
    const auto call = makeCall(rank, {.elements = rank == 2 ? 16U : 8U});
    expectContains(hears(rank, *call), "bytes in a row: ");
    expectThrough(rank, *call);
  });
}

TEST_F(DeviceFailure, OtherCallsAreNamed) {
  ranks_.run([&](int rank) {
    const auto call = makeCall(rank);
    if (rank != 1) {
      expectContains(hears(rank, *call), "dispatch on a device");
      expectThrough(rank, *call);
      return;
    }
    // The same on the CPU, where all the others are on their devices.
    try {
      call->runOnCpu(ranks_.engine(rank), ranks_.group(rank));
      ADD_FAILURE() << "no error";
    } catch (const InvalidArgument& error) {
      expectContains(error.what(), "dispatch on rank 1");
    }
  });
}

TEST_F(DeviceFailure, ARankThatDoesNotCallIsNamed) {
  ranks_.run([&](int rank) {
    if (rank == 3) {
      return;
    }
    const auto call = makeCall(rank);
    call->timeout = milliseconds(1500);
    expectContains(hears(rank, *call), "ranks that have not posted it: 3");
    expectThrough(rank, *call);
  });
}

TEST_F(DeviceFailure, ARankThatDiesIsNamed) {
  ranks_.run([&](int rank) {
    if (rank == 3) {
      // Long enough for the others to have enqueued, in most runs.
      std::this_thread::sleep_for(milliseconds(200));
      ranks_.engine(3).shutdown(milliseconds(0));
      return;
    }
    const auto call = makeCall(rank);
    expectContains(hears(rank, *call), "rank 3");
    expectThrough(rank, *call);
  });
}

TEST_F(DeviceFailure, ADeviceThatFailsIsNamed) {
  ranks_.run([&](int rank) {
    const auto call = makeCall(rank);
    if (rank == 2) {
      const auto made = ranks_.world().statistics(rank).enqueued;
      ranks_.world().failAt(rank, made + 12);
    }
    const std::string text = hears(rank, *call);
    expectContains(text, "as failAt() asked");
    expectThrough(rank, *call);
  });
}

TEST_F(DeviceFailure, AnErrorThatIsNoneOfOursIsNamed) {
  ranks_.run([&](int rank) {
    const auto call = makeCall(rank);
    if (rank == 1) {
      const auto made = ranks_.world().statistics(rank).enqueued;
      ranks_.world().failAt(rank, made + 12, true);
    }
    expectContains(hears(rank, *call), "fails in another way");
    expectThrough(rank, *call);
  });
}

TEST_F(DeviceFailure, WorkThatFailsOnTheDeviceIsNamed) {
  ranks_.run([&](int rank) {
    const auto call = makeCall(rank);
    DeviceExchange::Terms terms;
    terms.timeout = seconds(30);
    if (rank == 2) {
      // Nothing runs before all of it is enqueued, so no call throws.
      ranks_.world().stall(rank);
      terms.after = call->enqueueBroken();
    }
    const auto made = call->dispatchOnce(ranks_.exchange(rank), terms);
    if (rank == 2) {
      ranks_.world().resume(rank);
    }
    std::string text = "no error";
    try {
      finish(ranks_.engine(rank), *made.operation);
    } catch (const Error& error) {
      text = error.what();
    }
    // Others may have had what they need from it before.
    if (rank == 2 || text != "no error") {
      expectContains(text, "rank 2, dispatch on a device number 1");
      expectContains(text, "an illegal address");
    }
  });
}

TEST_F(DeviceFailure, ADeviceThatHangsTimesOut) {
  ranks_.world().stall(1);
  ranks_.run([&](int rank) {
    const auto call = makeCall(rank);
    call->timeout = milliseconds(1500);
    const std::string text = hears(rank, *call);
    expectContains(text, "timed out in");
    expectContains(text, "waiting for the streams of its own device");
    if (rank == 1) {
      ranks_.world().resume(1);
    }
    expectThrough(rank, *call);
  });
}

TEST_F(DeviceFailure, MemoryIsLetGoOnceTheStreamsAreThrough) {
  ranks_.world().stall(0);
  std::atomic<int> posted{0};
  std::atomic<int> finished{0};
  const auto until4 = [](const std::atomic<int>& count) {
    while (count < 4) {
      std::this_thread::sleep_for(milliseconds(1));
    }
  };
  ranks_.run([&](int rank) {
    const auto call = makeCall(rank);
    std::atomic<bool> released{false};
    DeviceExchange::Terms terms;
    terms.timeout = seconds(30);
    terms.callbacks.released = [&] { released = true; };
    const auto made = call->dispatchOnce(ranks_.exchange(rank), terms);
    posted += 1;
    if (rank == 3) {
      until4(posted);
      ranks_.group(3).abort("the test says so");
    }
    EXPECT_THROW(finish(ranks_.engine(rank), *made.operation), Error);
    finished += 1;
    if (rank == 0) {
      until4(finished);
      // Its device may still read it.
      std::this_thread::sleep_for(milliseconds(50));
      EXPECT_FALSE(released);
      ranks_.world().resume(0);
    }
    EXPECT_TRUE(eventually([&] { return released.load(); }));
    expectThrough(rank, *call);
  });
}

}  // namespace
}  // namespace automoe::testing
