// SPDX-License-Identifier: Apache-2.0
// Who asks a device whether a call is through, and what goes on meanwhile.
#include "process_group/exchange/device_turns.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "cuda/double_device.hpp"
#include "ranks.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;

class DeviceTurnsTest : public ::testing::Test {
 protected:
  DeviceTurnsTest() {
    const DeviceTurns::Hooks hooks{
        .failed = [this] { failures += 1; },
        .release = [this] { releases += 1; }};
    turns.emplace(ranks.engine(0), device, hooks);
  }
  ~DeviceTurnsTest() override {
    world.resume(0);
    turns.reset();
    device->destroyStream(stream);
  }

  std::shared_ptr<DeviceTurn> enqueue(bool captured = false) {
    const auto turn = turns->begin(std::make_shared<int>(1));
    device->record(turn->done()->get(), stream);
    turns->enqueued(*turn, captured);
    return turn;
  }

  Ranks ranks{Shape{{1}}};
  DoubleWorld world{1, 3};
  const std::shared_ptr<Device> device{world.makeDevice(0)};
  const Device::Stream stream = device->makeStream();
  std::atomic<int> failures{0};
  std::atomic<int> releases{0};
  std::optional<DeviceTurns> turns;
};

TEST_F(DeviceTurnsTest, OnlyTheOwnThreadAsksTheDevice) {
  world.stall(0);
  const auto first = enqueue();
  const auto second = enqueue();
  const DeviceStreams streams = turns->streamsOf(second);
  EXPECT_FALSE(streams.happened());
  EXPECT_FALSE(turns->awaitThrough(steady_clock::now() + milliseconds(20)));
  // No call of the device gets an answer now: the engine's thread needs none.
  world.failCalls(0, "happened", 1);
  EXPECT_TRUE(eventually([&] {
    try {
      turns->streamsOf(first).happened();
      return false;
    } catch (const DeviceError& error) {
      return std::string(error.what()).find("failCalls") != std::string::npos;
    }
  }));
  EXPECT_FALSE(streams.happened());
  world.resume(0);
  EXPECT_TRUE(turns->awaitThrough(steady_clock::now() + seconds(30)));
  EXPECT_TRUE(streams.happened());
  // Nobody knows what the stream does of the first call.
  EXPECT_FALSE(turns->end(milliseconds(0)));
  EXPECT_EQ(failures, 0);
  EXPECT_EQ(releases, 0);
}

TEST_F(DeviceTurnsTest, AfterAFailureWaitsAreReleasedUntilAllAreThrough) {
  world.stall(0);
  enqueue();
  turns->fail();
  turns->fail();
  EXPECT_FALSE(turns->awaitThrough(steady_clock::now() + seconds(30)));
  EXPECT_TRUE(eventually([&] { return releases > 3; }));
  EXPECT_FALSE(turns->end(milliseconds(20)));
  EXPECT_EQ(failures, 1);
}

TEST_F(DeviceTurnsTest, WithGraphsUntilTheEnd) {
  const auto kept = std::make_shared<int>(1);
  const auto turn = turns->begin(kept);
  turns->enqueued(*turn, true);
  EXPECT_TRUE(turns->awaitThrough(steady_clock::now() + seconds(30)));
  turns->fail();
  EXPECT_TRUE(eventually([&] { return releases > 3; }));
  const int before = releases;
  EXPECT_TRUE(eventually([&] { return releases > before + 3; }));
  EXPECT_TRUE(turns->end(seconds(10)));
  EXPECT_EQ(failures, 1);
}

/// Its streams may wait, though the only call has ended.
TEST_F(DeviceTurnsTest, WithADeviceThatDoesNotTellUntilTheEnd) {
  world.failCalls(0, "happened", 1);
  const auto turn = enqueue();
  EXPECT_TRUE(eventually([&] {
    try {
      return turns->streamsOf(turn).happened();
    } catch (const DeviceError&) {
      return true;
    }
  }));
  turns->fail();
  EXPECT_TRUE(eventually([&] { return releases > 3; }));
  EXPECT_FALSE(turns->end(seconds(10)));
}

TEST_F(DeviceTurnsTest, NobodyKnowsTheEndOfALostCall) {
  const auto turn = turns->begin(nullptr);
  turns->lose(*turn);
  EXPECT_TRUE(turns->awaitThrough(steady_clock::now() + seconds(30)));
  turns->fail();
  EXPECT_TRUE(eventually([&] { return releases > 3; }));
  EXPECT_FALSE(turns->end(seconds(10)));
}

TEST_F(DeviceTurnsTest, WithoutGraphsNoLongerThanNeeded) {
  enqueue();
  EXPECT_TRUE(turns->awaitThrough(steady_clock::now() + seconds(30)));
  turns->fail();
  EXPECT_TRUE(eventually([&] { return failures == 1; }));
  std::this_thread::sleep_for(milliseconds(20));
  EXPECT_EQ(releases, 0);
}

}  // namespace
}  // namespace automoe::testing
