// SPDX-License-Identifier: Apache-2.0
// The world that proves schedules finds what is wrong with a schedule.
#include "schedule_world.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace automoe::testing {
namespace {

constexpr unsigned kSeeds = 16;
constexpr uint64_t kLarge = 100'000;

Topology topologyOf(const std::vector<int64_t>& labels) {
  return Topology::fromNodeLabels(labels, 0);
}

// What the world says about schedules of two ranks, of any seed.
std::string complaint(
    const std::vector<int64_t>& labels,
    const std::function<void(Schedule&, Schedule&)>& fill) {
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    std::vector<Schedule> schedules(2);
    fill(schedules[0], schedules[1]);
    ScheduleWorld world(topologyOf(labels), std::move(schedules), {}, seed);
    const std::string text = world.run();
    if (!text.empty()) {
      return text;
    }
  }
  return "";
}

class ScheduleWorldTest : public ::testing::Test {
 protected:
  std::byte* from() { return from_.data(); }
  std::byte* to() { return to_.data(); }

  std::vector<std::byte> from_ = std::vector<std::byte>(kLarge, std::byte{1});
  std::vector<std::byte> to_ = std::vector<std::byte>(kLarge, std::byte{2});
};

void expectContains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos)
      << "expected \"" << part << "\" in \"" << text << "\"";
}

TEST_F(ScheduleWorldTest, MovesMessages) {
  for (const std::vector<int64_t>& labels :
       {std::vector<int64_t>{0, 0}, std::vector<int64_t>{0, 1}}) {
    for (const uint64_t bytes : {uint64_t{0}, uint64_t{100}, kLarge}) {
      const auto fill = [&](Schedule& a, Schedule& b) {
        std::ranges::fill(to_, std::byte{2});
        a.send(1, 7, from(), bytes);
        b.receive(0, 7, to(), bytes);
      };
      EXPECT_EQ(complaint(labels, fill), "");
      EXPECT_TRUE(std::equal(to(), to() + bytes, from()));
      EXPECT_TRUE(bytes == kLarge || to_[bytes] == std::byte{2});
    }
  }
}

TEST_F(ScheduleWorldTest, FindsAMessageThatNobodyReceives) {
  const auto fill = [&](Schedule& a, Schedule&) { a.send(1, 0, from(), 8); };
  expectContains(complaint({0, 0}, fill), "is left over");
}

TEST_F(ScheduleWorldTest, FindsAReceiveThatNobodySends) {
  const auto fill = [&](Schedule& a, Schedule& b) {
    a.send(1, 0, from(), 8);
    b.receive(0, 1, to(), 8);
  };
  expectContains(complaint({0, 1}, fill), "rank 1 hangs");
}

TEST_F(ScheduleWorldTest, FindsACircle) {
  const auto fill = [&](Schedule& a, Schedule& b) {
    a.send(1, 0, from(), 8, {{a.receive(1, 0, to(), 8)}});
    b.send(0, 0, from(), 8, {{b.receive(0, 0, to() + 8, 8)}});
  };
  expectContains(complaint({0, 1}, fill), "rank 0 hangs");
}

TEST_F(ScheduleWorldTest, FindsOtherSizes) {
  const auto fill = [&](Schedule& a, Schedule& b) {
    a.send(1, 0, from(), 8);
    b.receive(0, 0, to(), 9);
  };
  expectContains(complaint({0, 1}, fill), "has 8 bytes for 9");
}

TEST_F(ScheduleWorldTest, FindsAnotherMessageOfThatName) {
  const auto fill = [&](Schedule& a, Schedule& b) {
    for (int i = 0; i < 2; ++i) {
      a.send(1, 3, from(), 8);
      b.receive(0, 3, to() + 8 * i, 8);
    }
  };
  expectContains(complaint({0, 1}, fill), "message 3 from 0 to 1");
}

TEST_F(ScheduleWorldTest, FindsMemoryThatIsWrittenWhileItIsSent) {
  for (const std::vector<int64_t>& labels :
       {std::vector<int64_t>{0, 0}, std::vector<int64_t>{0, 1}}) {
    const auto fill = [&](Schedule& a, Schedule& b) {
      std::ranges::fill(from_, std::byte{1});
      std::ranges::fill(to_, std::byte{2});
      a.send(1, 0, from(), kLarge);
      a.copy(from(), to(), 1);
      b.receive(0, 0, to(), kLarge);
    };
    expectContains(complaint(labels, fill), "was written before it was read");
  }
}

TEST_F(ScheduleWorldTest, KnowsARankThatIsDoneBeforeAnotherHasStarted) {
  bool early = false;
  for (unsigned seed = 0; seed < kSeeds; ++seed) {
    std::vector<Schedule> schedules(2);
    schedules[0].send(1, 0, from(), 8);
    schedules[1].receive(0, 0, to(), 8);
    ScheduleWorld world(topologyOf({0, 1}), std::move(schedules), {}, seed);
    EXPECT_EQ(world.run(), "");
    EXPECT_EQ(world.crossed(0, 1), 8U);
    EXPECT_EQ(world.crossed(1, 0), 0U);
    early = early || !world.metInTheMiddle();
  }
  EXPECT_TRUE(early);
}

}  // namespace
}  // namespace automoe::testing
