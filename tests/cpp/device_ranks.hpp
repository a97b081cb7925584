// SPDX-License-Identifier: Apache-2.0
// Ranks whose devices are test doubles, and one dispatch and combine of a rank
// on the CPU and on its device.
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/double_device.hpp"
#include "moe_calls.hpp"
#include "process_group/exchange/device_exchange.hpp"
#include "ranks.hpp"

namespace automoe::testing {

class DeviceRanks {
 public:
  DeviceRanks(const Shape& shape, unsigned seed)
      : ranks_(shape), world_(shape.size(), seed) {
    std::vector<int> all;
    for (int rank = 0; rank < shape.size(); ++rank) {
      all.push_back(rank);
    }
    exchanges_.resize(all.size());
    ranks_.run([&](int rank) {
      std::unique_ptr<DeviceNetwork> network;
      if (ranks_.group(rank).topology().numNodes() > 1) {
        network = world_.makeNetwork(rank, all);
      }
      exchanges_[static_cast<size_t>(rank)] = std::make_unique<DeviceExchange>(
          unowned(ranks_.engine(rank)),
          unowned(ranks_.group(rank)),
          std::shared_ptr<Device>(world_.makeDevice(rank)),
          std::move(network),
          std::chrono::seconds(30));
    });
  }
  ~DeviceRanks() { end(); }

  /// The exchanges end; what their devices still hold shows in leaks().
  void end() {
    ranks_.run(
        [&](int rank) { exchanges_[static_cast<size_t>(rank)].reset(); });
  }

  /// One of them ends, while the others go on.
  void leave(int rank) { exchanges_[static_cast<size_t>(rank)].reset(); }

  /// The exchanges end; no work was wrong, and nothing is left.
  void expectNoErrors() {
    end();
    world_.settle();
    for (const std::string& error : world_.errors()) {
      ADD_FAILURE() << error;
    }
    for (int rank = 0; rank < size(); ++rank) {
      for (const std::string& leak : world_.leaks(rank)) {
        ADD_FAILURE() << "rank " << rank << ": " << leak;
      }
    }
  }

  int size() const { return ranks_.size(); }
  Ranks& ranks() { return ranks_; }
  DoubleWorld& world() { return world_; }
  DeviceExchange& exchange(int rank) {
    return *exchanges_[static_cast<size_t>(rank)];
  }
  Engine& engine(int rank) { return ranks_.engine(rank); }
  Group& group(int rank) { return ranks_.group(rank); }
  void run(const std::function<void(int)>& body) { ranks_.run(body); }

 private:
  template <typename T>
  static std::shared_ptr<T> unowned(T& it) {
    return {&it, [](T*) {}};
  }

  Ranks ranks_;
  DoubleWorld world_;
  std::vector<std::unique_ptr<DeviceExchange>> exchanges_;
};

/// What a test asks of one dispatch and combine.
struct DeviceCase {
  kernels::DType dtype = kernels::DType::kBFloat16;
  size_t elements = 8;
  bool weighted = true;
  bool withScalars = true;
  bool packed = false;
  unsigned seed = 1;
};

/// Tensors of a dispatch and the combine after it. The same bytes go in on the
/// CPU and on the device; expectSame() compares what has come out.
class TwinCall {
 public:
  /// `lists`: those of the plan where a device has made it.
  TwinCall(
      DeviceExchange& exchange,
      const PlanResult& plan,
      DeviceCase it,
      std::shared_ptr<const DeviceRoute> lists = nullptr)
      : device_(exchange.device()),
        plan_(plan),
        route_(plan_.route),
        it_(it),
        lists_(lists != nullptr ? lists : exchange.upload(route_)),
        user_(device_.makeStream()),
        ready_(device_.makeEvent()) {
    std::mt19937 random(it.seed * 64 + static_cast<unsigned>(route_.rank()));
    const auto tokens = static_cast<size_t>(route_.numTokens());
    const auto slots = tokens * static_cast<size_t>(route_.topK());
    const auto received = static_cast<size_t>(route_.numReceiveRows());
    const size_t sends = it.packed ? route_.numSendRows() : tokens;
    // Of float64 rows too, weights are float: what routers make.
    add(kX, sends * rowBytes(), random);
    add(kWeights, slots * weightBytes(), random);
    add(kReceived, received * rowBytes());
    add(kReceivedWeights, received * weightBytes());
    add(kOut, (it.packed ? route_.numSendRows() : tokens) * rowBytes());
    add(kScalarsOut, slots * weightBytes());
  }
  ~TwinCall() {
    try {
      device_.synchronize(user_);
    } catch (const DeviceError&) {
      // After an injected failure.
    }
    for (Buffer& buffer : buffers_) {
      device_.free(buffer.device);
      device_.freeHost(buffer.staging);
    }
    device_.destroyEvent(ready_);
    device_.destroyStream(user_);
  }
  TwinCall(const TwinCall&) = delete;
  TwinCall& operator=(const TwinCall&) = delete;

  void runOnCpu(Engine& engine, Group& group) {
    finish(
        engine,
        *group.dispatch(
            dispatchArguments(false), std::chrono::seconds(30), {}));
    finish(
        engine,
        *group.combine(combineArguments(false), std::chrono::seconds(30), {}));
  }

  /// Enqueues everything and waits for nothing.
  void enqueue(
      DeviceExchange& exchange, int maxBlocks = 0, bool fenced = false) {
    for (Buffer& buffer : buffers_) {
      device_.copy(
          user_,
          buffer.device,
          buffer.staging,
          buffer.input ? buffer.bytes : 0);
    }
    device_.record(ready_, user_);
    DeviceExchange::Terms terms;
    terms.after = ready_;
    terms.timeout = timeout;
    terms.maxBlocks = maxBlocks;
    terms.fenced = fenced;
    terms.wire = wire;
    calls.push_back(exchange.dispatch(lists_, dispatchArguments(true), terms));
    // The experts, on the user's stream, between the two.
    device_.await(user_, calls.back().done->get());
    device_.run(user_, [](kernels::DeviceStream) {});
    device_.record(ready_, user_);
    calls.push_back(exchange.combine(lists_, combineArguments(true), terms));
    device_.await(user_, calls.back().done->get());
    for (Buffer& buffer : buffers_) {
      device_.copy(
          user_,
          buffer.staging,
          buffer.device,
          buffer.input ? 0 : buffer.bytes);
    }
  }

  /// Work of the user's that fails on the device; the event after it.
  Device::Event enqueueBroken() {
    device_.run(user_, [](kernels::DeviceStream) {
      throw DeviceError("an illegal address");
    });
    device_.record(ready_, user_);
    return ready_;
  }

  /// Before anything is run: the weights of `other`, a call of the same tokens,
  /// and its rows of these numbers.
  void takeInputs(const TwinCall& other, const std::vector<size_t>& rows) {
    for (size_t i = 0; i < rows.size(); ++i) {
      std::memcpy(
          buffers_[kX].host.data() + i * rowBytes(),
          other.buffers_[kX].host.data() + rows[i] * rowBytes(),
          rowBytes());
    }
    buffers_[kWeights].host = other.buffers_[kWeights].host;
    for (const Name name : {kX, kWeights}) {
      const Buffer& buffer = buffers_[name];
      if (buffer.bytes > 0) {
        std::memcpy(buffer.staging, buffer.host.data(), buffer.bytes);
      }
    }
  }
  /// A row that came out of the combine, which expectSame() has compared.
  std::span<const std::byte> combined(size_t row) const {
    return std::span(buffers_[kOut].host).subspan(row * rowBytes(), rowBytes());
  }

  /// Seen from outside: whether anybody still holds the plan's lists.
  std::weak_ptr<const DeviceRoute> watchLists() const { return lists_; }

  /// One dispatch, from whatever the memory holds.
  DeviceExchange::Call dispatchOnce(
      DeviceExchange& exchange, DeviceExchange::Terms terms) {
    calls.push_back(
        exchange.dispatch(lists_, dispatchArguments(true), std::move(terms)));
    return calls.back();
  }

  void expectSame() {
    device_.synchronize(user_);
    const char* names[] = {
        "x", "weights", "received", "received weights", "out", "scalars"};
    for (size_t i = 0; i < buffers_.size(); ++i) {
      const Buffer& buffer = buffers_[i];
      const bool compared = i != kScalarsOut || it_.withScalars;
      EXPECT_TRUE(
          !compared || buffer.bytes == 0 ||
          std::memcmp(buffer.host.data(), buffer.staging, buffer.bytes) == 0)
          << names[i] << " of rank " << route_.rank() << " differ";
    }
  }

  std::chrono::milliseconds timeout = std::chrono::seconds(30);
  DeviceWire wire = DeviceWire::kAsIs;  // of rows, which say no number
  std::vector<DeviceExchange::Call> calls;

 private:
  enum Name { kX, kWeights, kReceived, kReceivedWeights, kOut, kScalarsOut };
  struct Buffer {
    size_t bytes = 0;
    bool input = false;
    std::vector<std::byte> host;
    std::byte* staging = nullptr;  // page-locked
    std::byte* device = nullptr;
  };

  size_t rowBytes() const {
    return it_.elements * kernels::elementBytes(it_.dtype);
  }
  size_t weightBytes() const { return kernels::sumBytes(it_.dtype); }

  void add(Name, size_t bytes) {
    Buffer& buffer = buffers_.emplace_back();
    buffer.bytes = bytes;
    buffer.host.resize(bytes, std::byte{0xEE});
    buffer.staging = device_.allocateHost(bytes + 1);
    buffer.device = device_.allocate(bytes + 1);
    std::memset(buffer.staging, 0x77, bytes);
  }
  void add(Name name, size_t bytes, std::mt19937& random) {
    add(name, bytes);
    Buffer& buffer = buffers_.back();
    buffer.input = true;
    // Small numbers of any type: bytes of numbers near 1.
    for (size_t at = 0; at < bytes; ++at) {
      buffer.host[at] = static_cast<std::byte>(random());
    }
    const size_t step = name == kX ? kernels::elementBytes(it_.dtype)
                                   : kernels::sumBytes(it_.dtype);
    for (size_t at = step - 1; at < bytes; at += step) {
      buffer.host[at] &= std::byte{0xBF};  // below 2 in every format
    }
    std::memcpy(buffer.staging, buffer.host.data(), bytes);
  }
  std::byte* at(Name name, bool onDevice) {
    Buffer& buffer = buffers_[name];
    return onDevice ? buffer.device : buffer.host.data();
  }

  DispatchArguments dispatchArguments(bool onDevice) {
    DispatchArguments arguments;
    arguments.route = plan_.route;
    arguments.receiveIndex = plan_.receiveIndex;
    arguments.fields = {
        {at(kX, onDevice), at(kReceived, onDevice), rowBytes()}};
    arguments.weights = at(kWeights, onDevice);
    arguments.receivedWeights = at(kReceivedWeights, onDevice);
    arguments.weightBytes = static_cast<uint32_t>(weightBytes());
    arguments.packed = it_.packed;
    return arguments;
  }
  CombineArguments combineArguments(bool onDevice) {
    CombineArguments arguments;
    arguments.route = plan_.route;
    arguments.receiveIndex = plan_.receiveIndex;
    arguments.dtype = it_.dtype;
    arguments.elements = it_.elements;
    arguments.rows = at(kReceived, onDevice);
    arguments.weighted = it_.weighted;
    arguments.weights = at(kReceivedWeights, onDevice);
    arguments.withScalars = it_.withScalars;
    arguments.scalars = at(kReceivedWeights, onDevice);
    arguments.out = at(kOut, onDevice);
    arguments.scalarsOut = at(kScalarsOut, onDevice);
    arguments.packed = it_.packed;
    return arguments;
  }

  Device& device_;
  const PlanResult plan_;
  const Route route_;
  const DeviceCase it_;
  const std::shared_ptr<const DeviceRoute> lists_;
  const Device::Stream user_;
  const Device::Event ready_;
  std::vector<Buffer> buffers_;
};

/// All are enqueued before the host looks at any result, for which it does not
/// wait; then each is compared with the CPU's.
inline void enqueueAndCompare(
    DeviceRanks& ranks,
    int rank,
    const std::vector<std::unique_ptr<TwinCall>>& calls,
    int maxBlocks = 0,
    bool fenced = false) {
  const auto before = ranks.world().statistics(rank);
  for (const auto& call : calls) {
    call->enqueue(ranks.exchange(rank), maxBlocks, fenced);
  }
  const auto after = ranks.world().statistics(rank);
  EXPECT_EQ(after.synchronized, before.synchronized);
  EXPECT_EQ(after.freed, before.freed);
  EXPECT_EQ(after.pageableCopies, before.pageableCopies);
  for (const auto& call : calls) {
    call->expectSame();
    for (const auto& made : call->calls) {
      finish(ranks.engine(rank), *made.operation);
    }
  }
}

}  // namespace automoe::testing
