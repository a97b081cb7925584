// SPDX-License-Identifier: Apache-2.0
// Ranks on whose devices something goes wrong: what all of them hear, and that
// nothing waits for ever.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "device_ranks.hpp"
#include "process_group/common/error.hpp"

namespace automoe::testing {

/// Ends the program when a test hangs, and says which.
class HangGuard {
 public:
  HangGuard() : thread_([this] { watch(); }) {}
  ~HangGuard() {
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  HangGuard(const HangGuard&) = delete;
  HangGuard& operator=(const HangGuard&) = delete;

 private:
  static constexpr auto kLimit = std::chrono::seconds(120);

  void watch() {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, kLimit, [this] { return over_; })) {
      std::fprintf(stderr, "hangs: %s\n", test_->name());
      std::abort();
    }
  }

  const ::testing::TestInfo* const test_ =
      ::testing::UnitTest::GetInstance()->current_test_info();
  std::mutex mutex_;
  std::condition_variable changed_;
  bool over_ = false;
  std::thread thread_;  // last: it uses all of the above
};

struct FailureCase {
  Shape shape;
  bool bounded = false;  // of plans
};

/// Ranks with devices in the nodes of the case.
class DeviceFailureTest : public ::testing::TestWithParam<FailureCase> {
 protected:
  /// Of calls that do not expire: more than it may take to hear of a failure.
  static constexpr auto kTimeout = std::chrono::seconds(30);
  static constexpr auto kPrompt = std::chrono::seconds(15);
  /// Of calls that do.
  static constexpr auto kShort = std::chrono::milliseconds(1500);

  DeviceFailureTest() { renew(); }
  void TearDown() override { end(); }

  /// Other ranks, of which none has failed.
  void renew() {
    if (ranks_ != nullptr) {
      end();
    }
    ranks_ = std::make_unique<DeviceRanks>(GetParam().shape, ++seed_);
  }
  void end() {
    // A device that is not through would be waited for, for ten seconds.
    expectWithin(std::chrono::seconds(8), [&] { ranks_->end(); });
  }

  void run(const std::function<void(int)>& body) { ranks_->run(body); }
  int size() const { return ranks_->size(); }
  int last() const { return size() - 1; }
  DoubleWorld& world() { return ranks_->world(); }
  DeviceExchange& exchange(int rank) { return ranks_->exchange(rank); }
  Engine& engine(int rank) { return ranks_->engine(rank); }
  Group& group(int rank) { return ranks_->group(rank); }

  /// The ids of all ranks: all have rows for all.
  Routing routing() const {
    Routing routing{.numExperts = 8, .topK = 8};
    for (int rank = 0; rank < size(); ++rank) {
      routing.ids.emplace_back();
      for (int i = 0; i < 24; ++i) {
        routing.ids.back().push_back(i % 8);
      }
    }
    return routing;
  }

  static void expectWithin(
      std::chrono::milliseconds limit, const std::function<void()>& body) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    EXPECT_LT(std::chrono::steady_clock::now() - begin, limit);
  }

  /// What is heard of `body`, which is soon.
  static std::string heardOf(const std::function<void()>& body) {
    std::string text = "no error";
    expectWithin(kPrompt, [&] {
      try {
        body();
      } catch (const std::exception& error) {
        text = error.what();
      }
    });
    return text;
  }

  /// What the group fails with, which is soon.
  std::string failureOf(int rank) {
    return heardOf([&] {
      EXPECT_TRUE(eventually([&] { return group(rank).failure() != nullptr; }));
      if (const std::exception_ptr failure = group(rank).failure()) {
        std::rethrow_exception(failure);
      }
    });
  }

  /// The device comes to the end of the calls, whatever has failed.
  void expectThrough(int rank, const std::vector<DeviceExchange::Call>& calls) {
    Device& device = exchange(rank).device();
    expectWithin(kPrompt, [&] {
      for (const auto& made : calls) {
        EXPECT_TRUE(eventually([&] {
          return device.happened(made.done->get());
        })) << "rank "
            << rank;
      }
    });
  }

  HangGuard guard_;
  unsigned seed_ = 4;
  std::unique_ptr<DeviceRanks> ranks_;
};

inline const Shape kTwoNodes{{2, 2}};
inline const Shape kFourNodes{{2, 2, 2, 2}};
inline const std::vector<FailureCase> kPlanFailureCases = {
    {kTwoNodes}, {kTwoNodes, true}, {kFourNodes}, {kFourNodes, true}};

/// "FourNodes", "FourNodesWithBound".
inline std::string nameOfCase(
    const ::testing::TestParamInfo<FailureCase>& info) {
  const size_t nodes = info.param.shape.ranksPerNode.size();
  return std::string(nodes == 2 ? "TwoNodes" : "FourNodes") +
         (info.param.bounded ? "WithBound" : "");
}

}  // namespace automoe::testing
