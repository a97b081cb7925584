// SPDX-License-Identifier: Apache-2.0
// The emulation of CUDA itself: it computes what CUDA does, and it sees the
// mistakes that the tests of kernels rely on it to see.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cuda/emulated_cuda.hpp"
#include "process_group/common/error.hpp"

namespace automoe::emulated {
namespace {

constexpr unsigned kAll = ~0U;

/// The error that a launch ends with.
std::string errorOf(
    unsigned blocks, unsigned threads, const std::function<void()>& body) {
  try {
    run("kernel", blocks, threads, 0, body);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

void expectParts(
    const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts) {
    EXPECT_NE(text.find(part), std::string::npos)
        << "expected \"" << part << "\" in \"" << text << "\"";
  }
}

/// Each thread takes its neighbour's number by way of shared memory.
std::vector<unsigned> takeNeighbours(bool waits) {
  constexpr unsigned kThreads = 64;
  std::vector<unsigned> taken(kThreads);
  run("neighbours", 1, kThreads, 0, [&] {
    AUTOMOE_SHARED(unsigned, numbers, kThreads);
    numbers[threadIdx.x] = threadIdx.x;
    if (waits) {
      __syncthreads();
    }
    taken[threadIdx.x] = numbers[(threadIdx.x + 1) % kThreads];
  });
  return taken;
}

TEST(EmulatedCuda, ShowsAMissingBarrier) {
  std::vector<unsigned> right;
  for (unsigned i = 0; i < 64; ++i) {
    right.push_back((i + 1) % 64);
  }
  int wrong = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    setSeed(seed);
    EXPECT_EQ(takeNeighbours(true), right);
    wrong += takeNeighbours(false) != right ? 1 : 0;
  }
  EXPECT_EQ(wrong, 20);
}

TEST(EmulatedCuda, ShowsAMissingWaitOfAWarp) {
  int wrong = 0;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    setSeed(seed);
    for (const bool waits : {true, false}) {
      std::vector<unsigned> sums(32);
      run("rotate", 1, 32, 0, [&] {
        AUTOMOE_SHARED(unsigned, numbers, 32);
        numbers[threadIdx.x] = threadIdx.x;
        __syncwarp();
        const unsigned next = numbers[(threadIdx.x + 1) % 32];
        if (waits) {
          __syncwarp();
        }
        numbers[threadIdx.x] = next;
        __syncwarp();
        sums[threadIdx.x] = numbers[threadIdx.x];
      });
      bool isRight = true;
      for (unsigned i = 0; i < 32; ++i) {
        isRight = isRight && sums[i] == (i + 1) % 32;
      }
      EXPECT_TRUE(isRight || !waits);
      wrong += isRight ? 0 : 1;
    }
  }
  EXPECT_GT(wrong, 10);
}

TEST(EmulatedCuda, ReportsABarrierThatNotAllReach) {
  const std::string text = errorOf(1, 64, [] {
    if (threadIdx.x != 40) {
      __syncthreads();
    }
  });
  expectParts(
      text,
      {"kernel, block 0, thread 0 waits for the block at device_kernels_emul",
       "but thread 40 has ended"});
}

TEST(EmulatedCuda, ReportsBarriersAtTwoPlaces) {
  const std::string text = errorOf(1, 64, [] {
    if (threadIdx.x < 7) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
  expectParts(
      text, {"thread 0 waits for the block", "but thread 7 waits for the"});
}

TEST(EmulatedCuda, ReportsAWarpCallWithoutALane) {
  const std::string ended = errorOf(1, 32, [] {
    if (threadIdx.x != 3) {
      __syncwarp();
    }
  });
  expectParts(ended, {"thread 0 waits for the lanes", "thread 3 has ended"});
  const std::string others =
      errorOf(1, 32, [] { static_cast<void>(__shfl_sync(1U << 5, 0, 0)); });
  expectParts(others, {"calls for lanes 32 without its own"});
  const std::string source = errorOf(1, 32, [] {
    if (threadIdx.x < 4) {
      static_cast<void>(__shfl_sync(0xFU, 0, 9));
    }
  });
  expectParts(source, {"a shuffle reads lane 9, which is not among"});
}

TEST(EmulatedCuda, ReportsAMisalignedAccess) {
  alignas(16) std::byte memory[64] = {};
  const std::string text = errorOf(3, 32, [&] {
    if (blockIdx.x == 1 && threadIdx.x == 5) {
      store(memory + 8, load<uint4>(memory + 16));
    }
  });
  expectParts(
      text,
      {"kernel, block 1, thread 5: misaligned access of 16 bytes",
       "ends with 8 (of 16)"});
  EXPECT_EQ(
      errorOf(1, 1, [&] { store(memory, load<uint4>(memory + 16)); }),
      "no error");
}

TEST(EmulatedCuda, PoisonsSharedMemoryForEachBlock) {
  std::vector<unsigned> found(4);
  run("poison", 4, 1, 8, [&] {
    AUTOMOE_SHARED(unsigned, word, 1);
    unsigned other;
    std::memcpy(&other, dynamicShared() + 4, sizeof(other));
    found[blockIdx.x] = *word == other ? *word : 0;
    *word = 1;
    std::fill_n(dynamicShared(), 8, std::byte{2});
  });
  EXPECT_EQ(found, std::vector<unsigned>(4, 0xCBCBCBCBU));
}

TEST(EmulatedCuda, GoesOnAfterAnError) {
  const std::string text = errorOf(1, 64, [] {
    __syncthreads();
    if (threadIdx.x == 63) {
      throw std::runtime_error("stop");
    }
    __syncthreads();
  });
  EXPECT_EQ(text, "stop");
  EXPECT_EQ(takeNeighbours(true).back(), 0U);
}

TEST(EmulatedCuda, RefusesWhatAGpuCannotLaunch) {
  expectParts(errorOf(1, 1025, [] {}), {"1025 threads", "1 to 1024"});
  expectParts(errorOf(0, 32, [] {}), {"0 blocks of 32 threads"});
}

TEST(EmulatedCuda, ShufflesAsAWarpDoes) {
  for (const int width : {32, 8}) {
    std::vector<unsigned> up(32), down(32), swapped(32), first(32);
    run("shuffles", 1, 32, 0, [&] {
      const unsigned lane = threadIdx.x;
      up[lane] = __shfl_up_sync(kAll, lane, 3, width);
      down[lane] = __shfl_down_sync(kAll, lane, 3, width);
      swapped[lane] = __shfl_xor_sync(kAll, lane, 5, width);
      first[lane] = __shfl_sync(kAll, lane, 1, width);
    });
    const auto size = static_cast<unsigned>(width);
    for (unsigned lane = 0; lane < 32; ++lane) {
      EXPECT_EQ(up[lane], lane % size < 3 ? lane : lane - 3);
      EXPECT_EQ(down[lane], lane % size + 3 < size ? lane + 3 : lane);
      EXPECT_EQ(swapped[lane], lane ^ 5U);
      EXPECT_EQ(first[lane], lane / size * size + 1);
    }
  }
}

TEST(EmulatedCuda, VotesOverTheLanesOfTheMask) {
  std::vector<unsigned> votes(64), groups(64);
  run("votes", 1, 64, 0, [&] {
    const unsigned lane = threadIdx.x % 32;
    if (lane < 16) {
      votes[threadIdx.x] = __ballot_sync(0xFFFFU, lane % 2 == 0 ? 1 : 0);
    }
    groups[threadIdx.x] = __match_any_sync(kAll, lane % 4);
  });
  for (unsigned i = 0; i < 64; ++i) {
    EXPECT_EQ(votes[i], i % 32 < 16 ? 0x5555U : 0U);
    EXPECT_EQ(groups[i], 0x11111111U << (i % 4));
  }
}

TEST(EmulatedCuda, AddsAtomically) {
  int sum = 0;
  std::set<int> before;
  run("add", 7, 96, 0, [&] { before.insert(atomicAdd(&sum, 1)); });
  EXPECT_EQ(sum, 7 * 96);
  EXPECT_EQ(before.size(), 7U * 96U);
}

std::vector<unsigned> orderOf(uint64_t seed) {
  std::vector<unsigned> order;
  setSeed(seed);
  run("order", 5, 40, 0, [&] {
    order.push_back(blockIdx.x * blockDim.x + threadIdx.x);
  });
  return order;
}

TEST(EmulatedCuda, HasAnotherOrderForEachSeed) {
  EXPECT_EQ(orderOf(3), orderOf(3));
  EXPECT_NE(orderOf(3), orderOf(4));
  std::vector<unsigned> order = orderOf(3);
  EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
  std::sort(order.begin(), order.end());
  for (unsigned i = 0; i < 200; ++i) {
    EXPECT_EQ(order[i], i);
  }
}

TEST(EmulatedCuda, RunsInSeveralThreadsAtATime) {
  std::vector<std::thread> threads;
  std::vector<int> right(3);
  for (size_t i = 0; i < right.size(); ++i) {
    threads.emplace_back([&right, i] {
      for (int round = 0; round < 20; ++round) {
        const auto taken = takeNeighbours(true);
        right[i] += taken[0] == 1 && taken[63] == 0 ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(right, std::vector<int>(3, 20));
}

}  // namespace
}  // namespace automoe::emulated
