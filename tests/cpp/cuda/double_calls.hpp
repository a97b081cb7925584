// SPDX-License-Identifier: Apache-2.0
// What the tests of the test double of Device share.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>

#include "cuda/double_device.hpp"

#define EXPECT_HAS(text, part)                         \
  do {                                                 \
    const std::string got = (text);                    \
    EXPECT_TRUE(contains(got, part)) << "got " << got; \
  } while (false)

namespace automoe::testing {

inline constexpr size_t kBytes = 64;
inline constexpr unsigned kSeeds = 200;
/// Enough where some of them must go wrong: most do.
inline constexpr unsigned kFewSeeds = 40;

inline std::byte* words(std::byte* memory, int first) {
  for (size_t i = 0; i < kBytes; ++i) {
    memory[i] = static_cast<std::byte>(static_cast<size_t>(first) + i);
  }
  return memory;
}

inline bool has(const std::byte* memory, int first) {
  std::byte expected[kBytes];
  return std::memcmp(memory, words(expected, first), kBytes) == 0;
}

inline uint32_t* asFlag(std::byte* memory) {
  return reinterpret_cast<uint32_t*>(memory);
}

inline std::string deviceErrorOf(const std::function<void()>& body) {
  try {
    body();
  } catch (const DeviceError& error) {
    return error.what();
  }
  return "no error";
}

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

/// A device of a rank, and two streams.
struct TwoStreams {
  explicit TwoStreams(DoubleWorld& world, int rank = 0)
      : device(world.makeDevice(rank)),
        first(device->makeStream()),
        second(device->makeStream()) {}
  ~TwoStreams() {
    device->destroyStream(first);
    device->destroyStream(second);
  }
  Device* operator->() { return device.get(); }

  std::unique_ptr<Device> device;
  Device::Stream first;
  Device::Stream second;
};

}  // namespace automoe::testing
