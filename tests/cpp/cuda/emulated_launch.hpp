// SPDX-License-Identifier: Apache-2.0
// One launch of emulated_cuda.hpp: the turns of the threads of its blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/emulated_cuda.hpp"
#include "cuda/fibers.hpp"

namespace automoe::emulated {

/// A generator that is faster than a fiber's switch.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15U | 1) {
    next();
    next();
  }

  uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_ >> 11;
  }
  size_t below(size_t end) { return next() % end; }

  template <class T>
  void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) {
      std::swap(values[i - 1], values[below(i)]);
    }
  }

 private:
  uint64_t state_;
};

enum class State : uint8_t { kReady, kInWarp, kInBlock, kEnded };

struct Thread {
  Fiber* fiber = nullptr;
  State state = State::kReady;
  // What it waits with.
  WarpCall call = WarpCall::kSync;
  unsigned mask = 0;
  unsigned lane = 0;
  uint64_t value = 0;
  Site site;
};

/// A grid in progress; its blocks take turns in it.
class Launch {
 public:
  Launch(
      const char* name,
      unsigned numThreads,
      size_t sharedBytes,
      const std::function<void()>& body,
      uint64_t seed);

  Random& random() { return random_; }
  void runBlock(unsigned block);

  // Called by threads.
  [[noreturn]] void fail(const std::string& what) const;
  void pause();
  void* shareArray(const void* tag, size_t bytes);
  std::byte* dynamicShared() { return dynamic_.data(); }
  uint64_t meetWarp(
      WarpCall call, unsigned mask, uint64_t value, unsigned lane, Site site);
  void meetBlock(Site site);

 private:
  static void runThread(void* launch);
  void beginBlock(unsigned block);
  void suspend(State state);
  void makeReady(size_t thread);
  bool isWarpComplete(size_t first, const Thread& last) const;
  void releaseWarp(size_t first, unsigned mask);
  uint64_t resultOf(size_t first, const Thread& thread) const;
  void releaseBlock();
  [[noreturn]] void failStuck() const;
  std::string where(size_t thread) const;
  std::string stateOf(size_t thread) const;

  const char* name_;
  const std::function<void()>& body_;
  Random random_;
  unsigned block_ = 0;
  std::vector<Thread> threads_;
  std::vector<size_t> ready_;
  size_t current_ = 0;
  size_t inBlock_ = 0;
  size_t ended_ = 0;
  std::exception_ptr error_;
  std::vector<std::byte> dynamic_;
  std::vector<std::pair<const void*, std::vector<std::byte>>> shared_;
};

}  // namespace automoe::emulated
