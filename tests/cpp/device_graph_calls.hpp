// SPDX-License-Identifier: Apache-2.0
// Calls of one rank on its device that are captured, replayed and compared with
// the CPU.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "device_ranks.hpp"
#include "device_ways.hpp"

namespace automoe::testing {

using Graph = std::shared_ptr<DoubleGraph>;

/// Of one dispatch and the combine after it, of float32.
struct Tensors {
  static constexpr size_t kCount = 6;

  Tensors(const Route& route, size_t h) {
    const auto tokens = static_cast<size_t>(route.numTokens());
    const auto slots = tokens * static_cast<size_t>(route.topK());
    const auto rows = static_cast<size_t>(route.numReceiveRows());
    const size_t sizes[] = {
        tokens * h, slots, rows * h, rows, tokens * h, slots};
    for (size_t i = 0; i < kCount; ++i) {
      all[i].assign(sizes[i], -1.0F);
    }
  }

  std::vector<float>& x() { return all[0]; }
  std::vector<float>& weights() { return all[1]; }
  std::vector<float>& received() { return all[2]; }
  std::vector<float>& receivedWeights() { return all[3]; }
  std::vector<float>& out() { return all[4]; }
  std::vector<float>& scalarsOut() { return all[5]; }

  void draw(unsigned seed) {
    std::mt19937 random(seed);
    for (auto* drawn : {&x(), &weights()}) {
      for (float& value : *drawn) {
        value = static_cast<float>(random() % 1000) / 7.0F;
      }
    }
  }
  void copyFrom(const Tensors& other) {
    for (size_t i = 0; i < kCount; ++i) {
      std::ranges::copy(other.all[i], all[i].begin());
    }
  }
  /// What memory holds that belongs to somebody else by now.
  void spoilInputs() {
    for (auto* spoilt : {&x(), &weights()}) {
      std::ranges::fill(*spoilt, 1e30F);
    }
  }
  /// What an expert does, in place.
  void applyExpert() {
    for (float& value : received()) {
      value *= 3.0F;
    }
  }

  std::array<std::vector<float>, kCount> all;
};

/// What the rows of these calls are, and how they come.
struct GraphCase {
  size_t h = 6;
  DeviceWire wire = DeviceWire::kAsIs;
};

/// Dispatch, experts and combine of one plan and rank, in steps that a stream
/// of the user takes one after the other while the host waits for nothing.
class GraphCalls {
 public:
  GraphCalls(
      DeviceRanks& ranks, int rank, const PlanResult& plan, GraphCase it = {})
      : ranks_(ranks),
        rank_(rank),
        plan_(plan),
        it_(it),
        route_(plan_.route),
        tensors_(route_, it.h),
        user_(device().makeStream()),
        ready_(device().makeEvent()) {
    for (auto& tensor : tensors_.all) {
      if (!tensor.empty()) {
        ranks.world().adopt(rank, tensor.data(), tensor.size() * sizeof(float));
      }
    }
  }
  ~GraphCalls() {
    try {
      device().synchronize(user_);
    } catch (const DeviceError&) {
      // A test that failed has said why. What is left uses what goes now.
      ranks_.world().stall(rank_);
    }
    for (auto& tensor : tensors_.all) {
      if (!tensor.empty()) {
        ranks_.world().disown(rank_, tensor.data());
      }
    }
    device().destroyEvent(ready_);
    device().destroyStream(user_);
  }
  GraphCalls(const GraphCalls&) = delete;
  GraphCalls& operator=(const GraphCalls&) = delete;

  Device& device() { return ranks_.exchange(rank_).device(); }
  Device::Stream user() const { return user_; }
  void upload() { lists_ = ranks_.exchange(rank_).upload(route_); }
  void forgetLists() { lists_.reset(); }

  /// What `body` enqueues for the user's stream.
  Graph capture(const std::function<void()>& body) {
    ranks_.world().beginCapture(rank_, user_);
    try {
      body();
    } catch (...) {
      try {
        ranks_.world().endCapture(rank_, user_);
      } catch (const DeviceError&) {
        // Of what was enqueued by then; the first error says why.
      }
      throw;
    }
    return ranks_.world().endCapture(rank_, user_);
  }
  Graph capture() {
    return capture([&] { enqueue(); });
  }
  void dispatch() {
    calls.push_back(ranks_.exchange(rank_).dispatch(
        lists_, dispatchArguments(tensors_), terms()));
    device().await(user_, calls.back().done->get());
  }
  /// Takes no inputs and gives no results: that is for the steps.
  void enqueue() {
    dispatch();
    call([&] { tensors_.spoilInputs(); });  // waited for, so used again
    call([&] { tensors_.applyExpert(); });
    combine();
  }

  void replay(const Graph& graph) {
    step([&] { ranks_.world().launch(graph, user_); }, true);
  }
  void eager() {
    step([&] { enqueue(); }, true);
  }
  /// As an evaluation makes it: an odd number of calls.
  void dispatchAlone() {
    step([&] { dispatch(); }, false);
  }

  /// "e": dispatch and combine, "d": a dispatch alone, "r": a replay.
  void play(const std::string& steps, const Graph& graph) {
    for (const char step : steps) {
      if (step == 'r') {
        replay(graph);
      } else if (step == 'e') {
        eager();
      } else {
        dispatchAlone();
      }
    }
  }

  /// Waits for all steps; compares what has come out with the CPU's.
  void finish() {
    device().synchronize(user_);
    for (size_t i = 0; i < steps_.size(); ++i) {
      const Step& it = *steps_[i];
      for (size_t tensor = 2; tensor < Tensors::kCount; ++tensor) {
        if (it.combined || tensor == 2 || tensor == 3) {
          EXPECT_TRUE(it.found.all[tensor] == it.expected.all[tensor])
              << "rank " << rank_ << ", step " << i << ", tensor " << tensor;
        }
      }
    }
    steps_.clear();
    for (const auto& made : calls) {
      testing::finish(ranks_.engine(rank_), *made.operation);
    }
    calls.clear();
  }

  std::vector<DeviceExchange::Call> calls;
  std::chrono::milliseconds timeout = std::chrono::seconds(30);

 private:
  struct Step {
    Step(const Route& route, size_t h) : expected(route, h), found(route, h) {}
    Tensors expected;
    Tensors found;
    bool combined = true;
  };

  void call(std::function<void()> body) {
    device().run(user_, [body = std::move(body)](auto) { body(); });
  }

  void step(const std::function<void()>& enqueueAll, bool combined) {
    steps_.push_back(std::make_unique<Step>(route_, it_.h));
    Step& it = *steps_.back();
    it.combined = combined;
    it.expected.draw(++drawn_ * 64 + static_cast<unsigned>(rank_));
    const auto inputs = std::make_shared<Tensors>(it.expected);
    runOnCpu(it.expected, combined);
    call([this, inputs] { tensors_.copyFrom(*inputs); });
    enqueueAll();
    call([this, &it] { it.found.copyFrom(tensors_); });
  }

  void runOnCpu(Tensors& tensors, bool combined) {
    Group& group = ranks_.group(rank_);
    dispatchOnCpu(tensors);
    if (combined) {
      tensors.applyExpert();
      testing::finish(
          ranks_.engine(rank_),
          *group.combine(
              combineArguments(tensors), std::chrono::seconds(30), {}));
    }
  }

  /// Rows of other nodes are rounded, where they come as 8-bit floats.
  void dispatchOnCpu(Tensors& tensors) {
    const Topology& topology = ranks_.group(rank_).topology();
    std::vector<float> rounded = tensors.x();
    roundRows(
        std::as_writable_bytes(std::span(rounded)),
        kernels::DType::kFloat32,
        it_.h);
    const std::vector<int32_t> ranks(tensors.x().size() / it_.h, rank_);
    std::vector<float> receivedRounded = tensors.received();
    std::vector<int32_t> from(tensors.received().size() / it_.h);
    DispatchArguments arguments = dispatchArguments(tensors);
    arguments.fields.push_back(
        {bytes(rounded), bytes(receivedRounded), it_.h * sizeof(float)});
    arguments.fields.push_back(
        {reinterpret_cast<const std::byte*>(ranks.data()),
         reinterpret_cast<std::byte*>(from.data()),
         sizeof(int32_t)});
    testing::finish(
        ranks_.engine(rank_),
        *ranks_.group(rank_).dispatch(arguments, std::chrono::seconds(30), {}));
    for (size_t i = 0; i < receivedRounded.size(); ++i) {
      const bool crossed = topology.nodeOf(from[i / it_.h]) != topology.node();
      if (crossed && it_.wire == DeviceWire::kFp8) {
        tensors.received()[i] = receivedRounded[i];
      }
    }
  }

  DeviceExchange::Terms terms() {
    device().record(ready_, user_);
    DeviceExchange::Terms terms;
    terms.after = ready_;
    terms.timeout = timeout;
    terms.wire = it_.wire;
    return terms;
  }
  void combine() {
    calls.push_back(ranks_.exchange(rank_).combine(
        lists_, combineArguments(tensors_), terms()));
    device().await(user_, calls.back().done->get());
  }

  static std::byte* bytes(std::vector<float>& of) {
    return reinterpret_cast<std::byte*>(of.data());
  }
  DispatchArguments dispatchArguments(Tensors& on) const {
    DispatchArguments arguments;
    arguments.route = plan_.route;
    arguments.receiveIndex = plan_.receiveIndex;
    arguments.fields = {
        {bytes(on.x()),
         bytes(on.received()),
         it_.h * sizeof(float),
         0,
         kernels::DType::kFloat32}};
    arguments.weights = bytes(on.weights());
    arguments.receivedWeights = bytes(on.receivedWeights());
    arguments.weightBytes = sizeof(float);
    return arguments;
  }
  CombineArguments combineArguments(Tensors& on) const {
    CombineArguments arguments;
    arguments.route = plan_.route;
    arguments.receiveIndex = plan_.receiveIndex;
    arguments.dtype = kernels::DType::kFloat32;
    arguments.elements = it_.h;
    arguments.rows = bytes(on.received());
    arguments.weighted = true;
    arguments.weights = bytes(on.receivedWeights());
    arguments.withScalars = true;
    arguments.scalars = bytes(on.receivedWeights());
    arguments.out = bytes(on.out());
    arguments.scalarsOut = bytes(on.scalarsOut());
    return arguments;
  }

  DeviceRanks& ranks_;
  const int rank_;
  const PlanResult plan_;
  const GraphCase it_;
  const Route route_;
  std::shared_ptr<const DeviceRoute> lists_;
  Tensors tensors_;  // the device's
  const Device::Stream user_;
  const Device::Event ready_;
  std::vector<std::unique_ptr<Step>> steps_;
  unsigned drawn_ = 0;
};

}  // namespace automoe::testing
