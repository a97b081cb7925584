// SPDX-License-Identifier: Apache-2.0
// Equal blocks between the devices of one node.
#include <gtest/gtest.h>

#include <algorithm>

#include "device_ranks.hpp"
#include "process_group/common/error.hpp"

namespace automoe::testing {
namespace {

using std::chrono::seconds;

/// The input and the output of one call; what comes from rank r for rank s in
/// call n is made of these numbers.
class Blocks {
 public:
  Blocks(Device& device, int rank, int size, size_t bytes, int call)
      : device_(device),
        size_(static_cast<size_t>(size)),
        bytes_(bytes),
        stream_(device.makeStream()),
        ready_(device.makeEvent()) {
    for (std::byte*& memory : device_memory_) {
      memory = device.allocate(size_ * bytes + 1);
    }
    for (std::byte*& memory : host_memory_) {
      memory = device.allocateHost(size_ * bytes + 1);
    }
    for (int peer = 0; peer < size; ++peer) {
      fill(host_memory_[0], static_cast<size_t>(peer), rank, peer, call);
      fill(host_memory_[2], static_cast<size_t>(peer), peer, rank, call);
    }
  }
  ~Blocks() {
    device_.synchronize(stream_);
    for (std::byte* memory : device_memory_) {
      device_.free(memory);
    }
    for (std::byte* memory : host_memory_) {
      device_.freeHost(memory);
    }
    device_.destroyEvent(ready_);
    device_.destroyStream(stream_);
  }
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;

  void exchange(DeviceExchange& exchange, bool fenced) {
    device_.copy(stream_, device_memory_[0], host_memory_[0], size_ * bytes_);
    device_.record(ready_, stream_);
    DeviceExchange::Terms terms;
    terms.after = ready_;
    terms.timeout = seconds(30);
    terms.fenced = fenced;
    call_ = exchange.allToAll(
        {device_memory_[0], device_memory_[1], bytes_}, terms);
    device_.await(stream_, call_.done->get());
    device_.copy(stream_, host_memory_[1], device_memory_[1], size_ * bytes_);
  }

  void expectRight(Engine& engine) {
    device_.synchronize(stream_);
    finish(engine, *call_.operation);
    EXPECT_EQ(std::memcmp(host_memory_[1], host_memory_[2], size_ * bytes_), 0);
  }

 private:
  void fill(std::byte* to, size_t block, int from, int peer, int call) {
    for (size_t i = 0; i < bytes_; ++i) {
      to[block * bytes_ + i] = static_cast<std::byte>(
          static_cast<int>(i) * 7 + from * 31 + peer * 5 + call * 3);
    }
  }

  Device& device_;
  const size_t size_;
  const size_t bytes_;
  const Device::Stream stream_;
  const Device::Event ready_;
  std::byte* device_memory_[2] = {};  // input, output
  std::byte* host_memory_[3] = {};    // input, output, what is right
  DeviceExchange::Call call_;
};

TEST(DeviceAllToAll, BlocksOfAllSizesInManyOrders) {
  for (unsigned seed = 1; seed < 6; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const int size = seed == 5 ? 1 : 4;
    DeviceRanks ranks(Shape{{size}}, seed);
    ranks.run([&](int rank) {
      std::vector<std::unique_ptr<Blocks>> calls;
      int number = 0;
      for (const size_t bytes : {16U, 4096U, 1U, 0U, 300000U, 48U}) {
        calls.push_back(std::make_unique<Blocks>(
            ranks.exchange(rank).device(), rank, size, bytes, number++));
        calls.back()->exchange(ranks.exchange(rank), bytes == 1);
      }
      for (const auto& call : calls) {
        call->expectRight(ranks.engine(rank));
      }
    });
    ranks.expectNoErrors();
  }
}

TEST(DeviceAllToAll, RanksSayThatBlocksDiffer) {
  DeviceRanks ranks(Shape{{2}}, 7);
  ranks.run([&](int rank) {
    Device& device = ranks.exchange(rank).device();
    std::byte* memory = device.allocate(256);
    DeviceExchange::Terms terms;
    terms.timeout = seconds(30);
    const size_t bytes = rank == 0 ? 16 : 32;
    try {
      const auto call = ranks.exchange(rank).allToAll(
          {memory, memory + 128, bytes}, std::move(terms));
      ranks.engine(rank).wait(
          *call.operation, Engine::Clock::time_point::max());
      ASSERT_NE(call.operation->error(), nullptr);
      std::rethrow_exception(call.operation->error());
    } catch (const Error& error) {
      EXPECT_NE(
          std::string(error.what()).find("bytes in a row: 16, rank 1 has 32"),
          std::string::npos)
          << error.what();
    }
    device.free(memory);
  });
}

}  // namespace
}  // namespace automoe::testing
