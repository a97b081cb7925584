// SPDX-License-Identifier: Apache-2.0
// One dispatch of several tensors on a device, and what must come out of it:
// the CPU's rows, rounded where they have crossed between nodes as 8-bit
// floats.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "device_ranks.hpp"
#include "device_ways.hpp"

namespace automoe::testing {

/// What a tensor of rows is made of.
struct FieldKind {
  std::optional<kernels::DType> number = kernels::DType::kBFloat16;
  size_t elements = 8;  // bytes, where they are no numbers

  size_t elementBytes() const {
    return number ? kernels::elementBytes(*number) : 1;
  }
  size_t rowBytes() const { return elements * elementBytes(); }
  size_t scaleBytes() const { return (elements + 127) / 128 * 4; }
  /// Whether 8-bit floats take fewer bytes.
  bool shrinks() const {
    return number.has_value() && *number != kernels::DType::kFloat64 &&
           elements + scaleBytes() < rowBytes();
  }
};

struct DispatchCase {
  std::vector<FieldKind> fields = {FieldKind{}};
  bool weighted = true;
  bool packed = false;
  DeviceWire wire = DeviceWire::kAsIs;
  int maxBlocks = 0;
  unsigned seed = 1;
};

class DispatchTwin {
 public:
  DispatchTwin(
      DeviceRanks& ranks, int rank, const Routing& routing, DispatchCase it)
      : ranks_(ranks),
        rank_(rank),
        device_(ranks.exchange(rank).device()),
        plan_(makePlan(ranks.engine(rank), ranks.group(rank), routing)),
        route_(plan_.route),
        it_(std::move(it)),
        lists_(ranks.exchange(rank).upload(route_)),
        user_(device_.makeStream()),
        ready_(device_.makeEvent()) {
    std::mt19937 random(it_.seed * 64 + static_cast<unsigned>(rank));
    const auto tokens = static_cast<size_t>(route_.numTokens());
    const size_t rows = it_.packed ? route_.numSendRows() : tokens;
    for (const FieldKind& field : it_.fields) {
      add(rows, field, random);
    }
    // float32 beside the rows, and from which rank a row is.
    add(tokens * static_cast<size_t>(route_.topK()),
        {std::nullopt, sizeof(float)},
        random);
    sources_.assign(rows, rank);
    expectFromCpu();
    device_.synchronize(user_);
  }
  ~DispatchTwin() {
    for (Tensor& tensor : tensors_) {
      device_.free(tensor.from);
      device_.free(tensor.to);
      device_.freeHost(tensor.host);
    }
    device_.destroyEvent(ready_);
    device_.destroyStream(user_);
  }
  DispatchTwin(const DispatchTwin&) = delete;
  DispatchTwin& operator=(const DispatchTwin&) = delete;

  /// Enqueues, and waits for nothing.
  void enqueue() {
    for (Tensor& tensor : tensors_) {
      if (!tensor.expected.empty()) {
        device_.clear(user_, tensor.to, tensor.expected.size());
      }
    }
    device_.record(ready_, user_);
    DeviceExchange::Terms terms;
    terms.after = ready_;
    terms.timeout = std::chrono::seconds(30);
    terms.maxBlocks = it_.maxBlocks;
    terms.wire = it_.wire;
    call_ = ranks_.exchange(rank_).dispatch(lists_, arguments(), terms);
  }
  void finish() {
    testing::finish(ranks_.engine(rank_), *call_.operation);
    device_.await(user_, call_.done->get());
    for (size_t i = 0; i < tensors_.size(); ++i) {
      Tensor& tensor = tensors_[i];
      const size_t bytes = tensor.expected.size();
      if (bytes == 0 || (i + 1 == tensors_.size() && !it_.weighted)) {
        continue;
      }
      device_.copy(user_, tensor.host, tensor.to, bytes);
      device_.synchronize(user_);
      EXPECT_EQ(std::memcmp(tensor.host, tensor.expected.data(), bytes), 0)
          << "tensor " << i << " of rank " << rank_;
    }
  }

  const Route& route() const { return route_; }
  RouteLists lists() const { return makeRouteLists(route_, topology()); }
  const Topology& topology() const { return ranks_.group(rank_).topology(); }
  /// What this rank has to send to other nodes.
  uint64_t bytesToOtherNodes() const {
    const RouteLists lists = this->lists();
    uint64_t rowBytes = 0;
    for (const FieldKind& field : it_.fields) {
      rowBytes += crossesAsFp8(field) ? field.elements + field.scaleBytes()
                                      : field.rowBytes();
    }
    uint64_t bytes = 0;
    for (int node = 0; node < topology().numNodes(); ++node) {
      const auto at = static_cast<size_t>(node);
      if (node != topology().node()) {
        bytes +=
            rowBytes * (lists.sendRowBegin[at + 1] - lists.sendRowBegin[at]);
        bytes += (it_.weighted ? sizeof(float) : 0) *
                 (lists.sendSlotBegin[at + 1] - lists.sendSlotBegin[at]);
      }
    }
    return bytes;
  }

 private:
  struct Tensor {
    FieldKind kind;
    std::vector<std::byte> input;
    std::vector<std::byte> expected;
    std::byte* from = nullptr;
    std::byte* to = nullptr;
    std::byte* host = nullptr;  // page-locked
  };

  bool crossesAsFp8(const FieldKind& field) const {
    return it_.wire == DeviceWire::kFp8 && field.shrinks();
  }

  void add(size_t rows, const FieldKind& kind, std::mt19937& random) {
    Tensor& tensor = tensors_.emplace_back();
    tensor.kind = kind;
    tensor.input.resize(rows * kind.rowBytes());
    const size_t step = kind.elementBytes();
    for (size_t at = 0; at < tensor.input.size(); ++at) {
      tensor.input[at] = static_cast<std::byte>(random());
      if (kind.number && at % step == step - 1) {
        tensor.input[at] &= std::byte{0xBF};  // below 2 in every format
      }
    }
    const auto received = static_cast<size_t>(route_.numReceiveRows());
    tensor.expected.resize(received * kind.rowBytes());
    const size_t most = std::max(tensor.input.size(), tensor.expected.size());
    tensor.from = device_.allocate(tensor.input.size() + 1);
    tensor.to = device_.allocate(tensor.expected.size() + 1);
    tensor.host = device_.allocateHost(most + 1);
    if (!tensor.input.empty()) {
      std::memcpy(tensor.host, tensor.input.data(), tensor.input.size());
      device_.copy(user_, tensor.from, tensor.host, tensor.input.size());
    }
  }

  /// The rows as they are after a way as 8-bit floats.
  static std::vector<std::byte> rounded(const Tensor& tensor) {
    std::vector<std::byte> rows = tensor.input;
    roundRows(rows, *tensor.kind.number, tensor.kind.elements);
    return rows;
  }

  /// Dispatches on the CPU: the rows, the rows rounded, and their sources.
  void expectFromCpu() {
    const auto received = static_cast<size_t>(route_.numReceiveRows());
    std::vector<std::vector<std::byte>> inputs;
    std::vector<std::vector<std::byte>> outputs;
    std::vector<int32_t> from(received);
    DispatchArguments arguments;
    for (size_t i = 0; i + 1 < tensors_.size(); ++i) {
      const Tensor& tensor = tensors_[i];
      inputs.push_back(tensor.input);
      inputs.push_back(
          crossesAsFp8(tensor.kind) ? rounded(tensor) : tensor.input);
      outputs.resize(inputs.size(), tensor.expected);
    }
    for (size_t i = 0; i < inputs.size(); ++i) {
      arguments.fields.push_back(
          {inputs[i].data(),
           outputs[i].data(),
           tensors_[i / 2].kind.rowBytes()});
    }
    arguments.fields.push_back(
        {reinterpret_cast<const std::byte*>(sources_.data()),
         reinterpret_cast<std::byte*>(from.data()),
         sizeof(int32_t)});
    arguments.route = plan_.route;
    arguments.receiveIndex = plan_.receiveIndex;
    arguments.packed = it_.packed;
    arguments.weightBytes = sizeof(float);
    arguments.weights = tensors_.back().input.data();
    arguments.receivedWeights = tensors_.back().expected.data();
    testing::finish(
        ranks_.engine(rank_),
        *ranks_.group(rank_).dispatch(arguments, std::chrono::seconds(30), {}));
    for (size_t i = 0; i < inputs.size(); ++i) {
      const size_t bytes = tensors_[i / 2].kind.rowBytes();
      const bool isRounded = i % 2 == 1;
      for (size_t row = 0; row < received; ++row) {
        const bool crossed = topology().nodeOf(from[row]) != topology().node();
        if (crossed == isRounded && bytes > 0) {
          std::memcpy(
              tensors_[i / 2].expected.data() + row * bytes,
              outputs[i].data() + row * bytes,
              bytes);
        }
      }
    }
  }

  DispatchArguments arguments() const {
    DispatchArguments arguments;
    for (size_t i = 0; i + 1 < tensors_.size(); ++i) {
      const Tensor& tensor = tensors_[i];
      arguments.fields.push_back(
          {tensor.from,
           tensor.to,
           tensor.kind.rowBytes(),
           0,
           tensor.kind.number});
    }
    arguments.packed = it_.packed;
    if (it_.weighted) {
      arguments.weightBytes = sizeof(float);
      arguments.weights = tensors_.back().from;
      arguments.receivedWeights = tensors_.back().to;
    }
    return arguments;
  }

  DeviceRanks& ranks_;
  const int rank_;
  Device& device_;
  const PlanResult plan_;
  const Route route_;
  const DispatchCase it_;
  const std::shared_ptr<const DeviceRoute> lists_;
  const Device::Stream user_;
  const Device::Event ready_;
  std::vector<Tensor> tensors_;  // the last one: weights
  std::vector<int32_t> sources_;
  DeviceExchange::Call call_;
};

}  // namespace automoe::testing
