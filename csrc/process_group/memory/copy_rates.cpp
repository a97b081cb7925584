// SPDX-License-Identifier: Apache-2.0
#include "process_group/memory/copy_rates.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "process_group/common/error.hpp"
#include "process_group/memory/mate.hpp"

namespace automoe {
namespace {

// Larger than a core's own cache, as blocks are for which this matters.
constexpr size_t kBytes = size_t{2} << 20;
constexpr size_t kChunk = size_t{128} << 10;
constexpr int kTries = 3;

// Best of a few tries: interruptions only make it slower. 0 if `copy` fails.
template <typename Copy>
double rate(const Copy& copy) {
  double best = 0;
  for (int i = 0; i < kTries; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    if (!copy()) {
      return 0;
    }
    const std::chrono::duration<double, std::nano> took =
        std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(kBytes) / took.count());
  }
  return best;
}

// Keeps the compiler from dropping copies that nobody reads.
void used(const std::byte* data) {
  asm volatile("" : : "r"(data) : "memory");
}

std::string oneDecimal(double value) {
  const auto tenths = static_cast<int64_t>(value * 10 + 0.5);
  return concat(tenths / 10, ".", tenths % 10);
}

}  // namespace

CopyRates measureCopyRates() {
  std::vector<std::byte> from(kBytes, std::byte{1});
  std::vector<std::byte> to(kBytes, std::byte{2});
  std::vector<std::byte> chunk(kChunk, std::byte{3});
  CopyRates rates;
  rates.staged = rate([&] {
    for (size_t at = 0; at < kBytes; at += kChunk) {
      std::memcpy(chunk.data(), from.data() + at, kChunk);
      used(chunk.data());
      std::memcpy(to.data() + at, chunk.data(), kChunk);
      used(to.data());
    }
    return true;
  });
  rates.crossMemory = rate([&] {
    return readProcessMemory(
        ::getpid(), reinterpret_cast<uint64_t>(from.data()), to.data(), kBytes);
  });
  return rates;
}

std::string CopyRates::describe() const {
  const std::string two =
      concat("two copies in the cache at ", oneDecimal(staged), " GB/s");
  if (crossMemory == 0) {
    return two + "; cross-memory reads are not allowed";
  }
  return concat(
      two, ", one cross-memory read at ", oneDecimal(crossMemory), " GB/s");
}

}  // namespace automoe
