// SPDX-License-Identifier: Apache-2.0
// How devices of a group begin: what fails on one rank is told on all, at once,
// and the group goes on without.
#include "process_group/exchange/device_setup.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>

#include "cuda/emulated_cuda.hpp"
#include "device_ranks.hpp"
#include "process_group/common/error.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

/// Of all ranks: how many networks they have made, and which of them was the
/// last whose host waited for its peers.
struct Meeting {
  std::mutex mutex;
  std::condition_variable changed;
  std::array<int, 4> made = {};
  std::array<int, 4> met = {};
};

/// A network whose first exchange, as NCCL's, waits for the hosts of its peers.
class MeetingNetwork final : public DeviceNetwork {
 public:
  MeetingNetwork(
      int rank, Meeting& meeting, std::unique_ptr<DeviceNetwork> network)
      : rank_(static_cast<size_t>(rank)),
        meeting_(meeting),
        number_(++meeting.made[rank_]),
        network_(std::move(network)) {}

  void exchange(
      Device::Stream stream,
      std::span<const Send> sends,
      std::span<const Receive> receives) override {
    network_->exchange(stream, sends, receives);
    std::unique_lock lock(meeting_.mutex);
    meeting_.met[rank_] = number_;
    meeting_.changed.notify_all();
    const auto limit = std::chrono::steady_clock::now() + seconds(60);
    meeting_.changed.wait_until(lock, limit, [&] {
      return aborted_ || std::ranges::all_of(sends, [&](const Send& send) {
               return meeting_.met[static_cast<size_t>(send.peer)] >= number_;
             });
    });
    if (aborted_) {
      throw DeviceError("the network does not go on");
    }
  }
  void abort() noexcept override {
    network_->abort();
    const std::lock_guard lock(meeting_.mutex);
    aborted_ = true;
    meeting_.changed.notify_all();
  }
  std::string failure() override { return network_->failure(); }

 private:
  const size_t rank_;
  Meeting& meeting_;
  const int number_;
  const std::unique_ptr<DeviceNetwork> network_;
  bool aborted_ = false;
};

/// Two nodes of two ranks whose devices are not set up yet.
class DeviceSetupTest : public ::testing::Test {
 protected:
  std::unique_ptr<DeviceExchange> make(
      int rank,
      milliseconds timeout = seconds(30),
      const std::function<void()>& whenFull = {}) {
    std::shared_ptr<Device> device = world_->makeDevice(rank);
    device->setMemoryHook(whenFull);
    return std::make_unique<DeviceExchange>(
        unowned(ranks_.engine(rank)),
        unowned(ranks_.group(rank)),
        std::move(device),
        std::make_unique<MeetingNetwork>(
            rank, meeting_, world_->makeNetwork(rank, {0, 1, 2, 3})),
        timeout);
  }

  /// What each rank hears; none of the exchanges is made, or all.
  std::vector<std::string> hear(
      milliseconds timeout = seconds(30),
      const std::function<void(int)>& then = [](int) {}) {
    std::vector<std::string> heard(4, "no error");
    ranks_.run([&](int rank) {
      try {
        const auto made = make(rank, timeout);
      } catch (const DeviceError& error) {
        heard[static_cast<size_t>(rank)] = error.what();
      }
      then(rank);
    });
    return heard;
  }

  /// The group can be used: by hosts, and by devices from the beginning.
  void expectUsable() {
    const Routing routing = randomRouting(4, 8, 2, 5, 1);
    ranks_.run([&](int rank) {
      const PlanResult plan =
          makePlan(ranks_.engine(rank), ranks_.group(rank), routing);
      const auto exchange = make(rank);
      {
        TwinCall call(*exchange, plan, {});
        call.runOnCpu(ranks_.engine(rank), ranks_.group(rank));
        call.enqueue(*exchange);
        call.expectSame();
        for (const auto& made : call.calls) {
          finish(ranks_.engine(rank), *made.operation);
        }
      }
    });
  }

  template <typename T>
  static std::shared_ptr<T> unowned(T& it) {
    return {&it, [](T*) {}};
  }

  Ranks ranks_{Shape{{2, 2}}};
  // Before the world, whose networks use it.
  Meeting meeting_;
  // A world of each test's own: what a failed setup keeps is in it.
  std::optional<DoubleWorld> world_{std::in_place, 4, 7U};
};

TEST_F(DeviceSetupTest, WhatFailsOnARankIsToldOnAll) {
  // In the order of the setup; the first calls of each method are in it.
  for (const char* method :
       {"makeStream",
        "makeEvent",
        "allocateHost",
        "allocate",
        "allocateShared",
        "exportMemory",
        "run",
        "record",
        "happened",
        "mapHost",
        "setFlag",
        "awaitFlag",
        "openMemory",
        "copy",
        "exchange"}) {
    SCOPED_TRACE(method);
    world_.emplace(4, 7U);
    world_->failCalls(1, method, 1);
    const auto begin = std::chrono::steady_clock::now();
    for (const std::string& text : hear()) {
      expectContains(text, "rank 1: ");
      expectContains(text, method);
    }
    EXPECT_LT(std::chrono::steady_clock::now() - begin, seconds(20));
    expectUsable();
    for (const std::string& error : world_->errors()) {
      ADD_FAILURE() << error;
    }
  }
}

/// The cause is named, also where ranks with lower numbers waited for that one.
TEST_F(DeviceSetupTest, ARankThatDoesNotMeetItsPeersIsNotWaitedFor) {
  for (const int failing : {0, 3}) {
    SCOPED_TRACE(failing);
    world_.emplace(4, 7U);
    world_->failCalls(failing, "exchange", 1);
    const auto begin = std::chrono::steady_clock::now();
    for (const std::string& text : hear()) {
      expectContains(text, "rank " + std::to_string(failing) + ": ");
      expectContains(text, "exchange");
    }
    EXPECT_LT(std::chrono::steady_clock::now() - begin, seconds(10));
    expectUsable();
  }
}

/// A plan that the device makes, for its kernels.
void planOnDevice(DeviceExchange& exchange, Engine& engine) {
  Device& device = exchange.device();
  std::vector<std::byte*> lists;
  const auto list = [&](size_t words) {
    lists.push_back(device.allocate(words * sizeof(int32_t) + 1));
    return reinterpret_cast<int32_t*>(lists.back());
  };
  DevicePlanArguments arguments;
  arguments.numTokens = 600;  // more than one tile of slots
  arguments.topK = 8;
  arguments.numExperts = 8;
  arguments.topkIds = reinterpret_cast<const std::byte*>(list(600 * 8));
  arguments.allocate = [&](size_t rows) {
    return DevicePlanArguments::Outputs{list(rows), list(2), list(2)};
  };
  const Device::Stream user = device.makeStream();
  const Device::Event ready = device.makeEvent();
  device.clear(user, lists[0], 600 * 8 * sizeof(int32_t));
  device.record(ready, user);
  DeviceExchange::Terms terms;
  terms.after = ready;
  terms.timeout = seconds(30);
  const auto planned = exchange.plan(arguments, terms);
  finish(engine, *planned.call.operation);
  for (std::byte* memory : lists) {
    device.free(memory);
  }
  device.destroyEvent(ready);
  device.destroyStream(user);
}

TEST_F(DeviceSetupTest, CallsLaunchOnlyWhatIsLoaded) {
  using kernels::DType;
  emulated::unloadKernels();
  std::vector<std::unique_ptr<DeviceExchange>> made(4);
  ranks_.run([&](int rank) { made[static_cast<size_t>(rank)] = make(rank); });
  const uint64_t launches = emulated::countLaunches();
  const uint64_t unloaded = emulated::countUnloadedLaunches();
  const Routing routing = randomRouting(4, 8, 2, 5, 1);
  ranks_.run([&](int rank) {
    Engine& engine = ranks_.engine(rank);
    auto& exchange = made[static_cast<size_t>(rank)];
    const PlanResult plan = makePlan(engine, ranks_.group(rank), routing);
    for (const DType dtype :
         {DType::kFloat64, DType::kFloat32, DType::kBFloat16}) {
      for (const size_t elements : {1, 2, 4, 8, 128}) {
        for (const auto wire : {DeviceWire::kAsIs, DeviceWire::kFp8}) {
          TwinCall call(
              *exchange, plan, {.dtype = dtype, .elements = elements});
          call.wire = wire;
          call.enqueue(*exchange);
          for (const auto& part : call.calls) {
            finish(engine, *part.operation);
          }
        }
      }
    }
    planOnDevice(*exchange, engine);
    exchange.reset();
  });
  EXPECT_GT(emulated::countLaunches(), launches + 100);
  EXPECT_EQ(emulated::countUnloadedLaunches(), unloaded);
  for (const std::string& error : world_->errors()) {
    ADD_FAILURE() << error;
  }
}

TEST_F(DeviceSetupTest, WhatNoMateHasOpenedIsFreed) {
  world_->failCalls(2, "exportMemory", 1);
  expectContains(hear()[0], "rank 2: ");
  for (int rank = 0; rank < 4; ++rank) {
    for (const std::string& leak : world_->leaks(rank)) {
      ADD_FAILURE() << "rank " << rank << ": " << leak;
    }
  }
}

TEST_F(DeviceSetupTest, ADeviceThatDoesNothingIsNamed) {
  world_->stall(1);
  std::atomic<bool> resumed{false};
  const auto heard = hear(milliseconds(500), [&](int rank) {
    if (rank != 1 && !resumed.exchange(true)) {
      world_->resume(1);
    }
  });
  for (const std::string& text : heard) {
    expectContains(text, "rank 1: test double (1) has waited 500 ms for");
  }
  expectUsable();
}

TEST_F(DeviceSetupTest, AFullDeviceIsAskedTwice) {
  std::atomic<int> asked{0};
  ranks_.run([&](int rank) {
    if (rank == 3) {
      world_->failCalls(rank, "allocateShared", 1);
    }
    EXPECT_NO_THROW(make(rank, seconds(30), [&] { asked += 1; }));
  });
  EXPECT_EQ(asked, 1);
  ranks_.run([&](int rank) {
    if (rank == 3) {
      world_->failCalls(rank, "allocateShared", 2);
    }
    try {
      make(rank, seconds(30), [&] { asked += 1; });
      ADD_FAILURE() << "no error";
    } catch (const DeviceError& error) {
      expectContains(error.what(), "rank 3: rank 3: allocateShared");
    }
  });
  EXPECT_EQ(asked, 2);
}

TEST_F(DeviceSetupTest, ARankThatDiesIsNamed) {
  ranks_.run([&](int rank) {
    if (rank == 3) {
      ranks_.engine(3).shutdown(milliseconds(0));
      return;
    }
    try {
      make(rank);
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      expectContains(error.what(), "rank 3");
    }
  });
}

}  // namespace
}  // namespace automoe::testing
