// SPDX-License-Identifier: Apache-2.0
// A plan that the device of one rank makes.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cstring>
#include <functional>
#include <vector>

#include "device_ranks.hpp"
#include "process_group/exchange/device_plan.hpp"

namespace automoe::testing {

/// The plan of one rank on its device; memory of a user's.
class PlanCall {
 public:
  PlanCall(DeviceExchange& exchange, const Routing& routing, int rank)
      : device_(exchange.device()),
        user_(device_.makeStream()),
        ready_(device_.makeEvent()) {
    const auto& ids = routing.ids[static_cast<size_t>(rank)];
    arguments_.numTokens = routing.numTokens(rank);
    arguments_.topK = routing.topK;
    arguments_.numExperts = routing.numExperts;
    arguments_.align = routing.align;
    arguments_.maxReceiveTokens = routing.maxReceiveTokens;
    arguments_.topkIds = list(ids.size());
    setIds(ids);
    arguments_.allocate = [this](size_t rows) {
      beforeLists();
      lengths_ = {rows, numExperts(), numExperts()};
      outputs_ = {list(rows), list(numExperts()), list(numExperts())};
      const auto at = [](std::byte* it) {
        return reinterpret_cast<int32_t*>(it);
      };
      return DevicePlanArguments::Outputs{
          at(outputs_[0]), at(outputs_[1]), at(outputs_[2])};
    };
    for (int32_t expert = 0; expert < routing.numExperts; ++expert) {
      experts_ += routing.rankOf(expert) == rank ? 1 : 0;
    }
  }
  ~PlanCall() {
    try {
      device_.synchronize(user_);
    } catch (const DeviceError&) {
      // After an injected failure.
    }
    for (std::byte* memory : memory_) {
      device_.free(memory);
    }
    for (std::byte* memory : staging_) {
      device_.freeHost(memory);
    }
    device_.destroyEvent(ready_);
    device_.destroyStream(user_);
  }
  PlanCall(const PlanCall&) = delete;
  PlanCall& operator=(const PlanCall&) = delete;

  Device::Stream user() const { return user_; }
  void setIds(const std::vector<int32_t>& ids) {
    device_.copy(
        user_,
        const_cast<std::byte*>(arguments_.topkIds),
        staged(ids.size(), ids.data()),
        ids.size() * sizeof(int32_t));
  }

  DeviceExchange::Planned make(DeviceExchange& exchange, bool fenced = false) {
    device_.record(ready_, user_);
    DeviceExchange::Terms terms;
    terms.after = ready_;
    terms.timeout = timeout;
    terms.fenced = fenced;
    const auto planned = exchange.plan(arguments_, terms);
    device_.await(user_, planned.call.done->get());
    return planned;
  }

  void expectSame(const PlanResult& plan) {
    const std::vector<int32_t>* expected[] = {
        &plan.receiveIndex, &plan.numTokensPerExpert, &plan.offsets};
    const char* names[] = {"receiveIndex", "numTokensPerExpert", "offsets"};
    for (size_t i = 0; i < 3; ++i) {
      ASSERT_EQ(lengths_[i], expected[i]->size()) << names[i];
      const size_t bytes = lengths_[i] * sizeof(int32_t);
      std::byte* host = staged(lengths_[i], nullptr);
      device_.copy(user_, host, outputs_[i], bytes);
      device_.synchronize(user_);
      std::vector<int32_t> got(lengths_[i]);
      std::memcpy(got.data(), host, bytes);
      EXPECT_EQ(got, *expected[i]) << names[i];
    }
  }

  std::chrono::milliseconds timeout = std::chrono::seconds(30);
  /// Called before there is memory for the lists of the user's.
  std::function<void()> beforeLists = [] {};

 private:
  size_t numExperts() const { return experts_; }
  std::byte* list(size_t count) {
    return memory_.emplace_back(device_.allocate(count * sizeof(int32_t) + 1));
  }
  std::byte* staged(size_t count, const int32_t* from) {
    std::byte* to = staging_.emplace_back(
        device_.allocateHost(count * sizeof(int32_t) + 1));
    if (from != nullptr && count > 0) {
      std::memcpy(to, from, count * sizeof(int32_t));
    }
    return to;
  }

  Device& device_;
  const Device::Stream user_;
  const Device::Event ready_;
  size_t experts_ = 0;
  DevicePlanArguments arguments_;
  std::vector<std::byte*> memory_;
  std::vector<std::byte*> staging_;
  std::array<std::byte*, 3> outputs_ = {};
  std::array<size_t, 3> lengths_ = {};
};

}  // namespace automoe::testing
