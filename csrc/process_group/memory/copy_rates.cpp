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

constexpr size_t kBytes = 128 * 1024;
constexpr int kTries = 5;

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

std::string oneDecimal(double value) {
  const auto tenths = static_cast<int64_t>(value * 10 + 0.5);
  return concat(tenths / 10, ".", tenths % 10);
}

}  // namespace

CopyRates measureCopyRates() {
  std::vector<std::byte> from(kBytes, std::byte{1});
  std::vector<std::byte> to(kBytes, std::byte{2});
  CopyRates rates;
  rates.inCache = rate([&] {
    std::memcpy(to.data(), from.data(), kBytes);
    // Keeps the compiler from dropping copies that nobody reads.
    asm volatile("" : : "r"(to.data()) : "memory");
    return true;
  });
  rates.crossMemory = rate([&] {
    return readProcessMemory(
        ::getpid(), reinterpret_cast<uint64_t>(from.data()), to.data(), kBytes);
  });
  return rates;
}

std::string CopyRates::describe() const {
  if (crossMemory == 0) {
    return "cross-memory reads are not allowed";
  }
  return concat(
      "one cross-memory read at ",
      oneDecimal(crossMemory),
      " GB/s against two copies in the cache at ",
      oneDecimal(inCache),
      " GB/s");
}

}  // namespace automoe
