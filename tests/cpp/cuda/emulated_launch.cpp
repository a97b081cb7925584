// SPDX-License-Identifier: Apache-2.0
#include "cuda/emulated_launch.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>

namespace automoe::emulated {
namespace {

constexpr unsigned kWarpLanes = 32;
constexpr std::byte kPoison{0xCB};
constexpr uint64_t kPauseEvery = 4;

std::string nameOf(Site site) {
  const std::string file = site.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" +
         std::to_string(site.line());
}

bool isSamePlace(Site a, Site b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

/// Fibers are kept, as making them takes longer than most blocks run.
Fiber* fiberOf(size_t thread) {
  thread_local std::vector<std::unique_ptr<Fiber>> fibers;
  while (fibers.size() <= thread) {
    fibers.push_back(std::make_unique<Fiber>());
  }
  return fibers[thread].get();
}

}  // namespace

Launch::Launch(
    const char* name,
    unsigned numThreads,
    size_t sharedBytes,
    const std::function<void()>& body,
    uint64_t seed)
    : name_(name),
      body_(body),
      random_(seed),
      threads_(numThreads),
      dynamic_(sharedBytes) {
  for (size_t i = 0; i < threads_.size(); ++i) {
    threads_[i].fiber = fiberOf(i);
  }
}

void Launch::fail(const std::string& what) const {
  throw std::runtime_error(where(current_) + ": " + what);
}

std::string Launch::where(size_t thread) const {
  return std::string(name_) + ", block " + std::to_string(block_) +
         ", thread " + std::to_string(thread);
}

std::string Launch::stateOf(size_t thread) const {
  const Thread& of = threads_[thread];
  switch (of.state) {
    case State::kEnded:
      return "has ended";
    case State::kInBlock:
      return "waits for the block at " + nameOf(of.site);
    case State::kInWarp:
      return "waits for the lanes " + std::to_string(of.mask) + " at " +
             nameOf(of.site);
    case State::kReady:
      break;
  }
  return "can run";
}

void Launch::runThread(void* launch) {
  auto& self = *static_cast<Launch*>(launch);
  try {
    self.body_();
  } catch (...) {
    self.error_ = std::current_exception();
  }
}

void Launch::beginBlock(unsigned block) {
  block_ = block;
  blockIdx.x = block;
  inBlock_ = 0;
  ended_ = 0;
  error_ = nullptr;
  std::fill(dynamic_.begin(), dynamic_.end(), kPoison);
  for (auto& [tag, bytes] : shared_) {
    std::fill(bytes.begin(), bytes.end(), kPoison);
  }
  ready_.resize(threads_.size());
  std::iota(ready_.begin(), ready_.end(), size_t{0});
  for (Thread& thread : threads_) {
    thread.state = State::kReady;
    thread.fiber->prepare(&Launch::runThread, this);
  }
}

void Launch::runBlock(unsigned block) {
  beginBlock(block);
  while (!ready_.empty()) {
    std::swap(ready_[random_.below(ready_.size())], ready_.back());
    current_ = ready_.back();
    ready_.pop_back();
    threadIdx.x = static_cast<unsigned>(current_);
    const bool hasEnded = threads_[current_].fiber->resume();
    if (error_ != nullptr) {
      std::rethrow_exception(std::exchange(error_, nullptr));
    }
    if (hasEnded) {
      threads_[current_].state = State::kEnded;
      ended_ += 1;
    }
  }
  if (ended_ < threads_.size()) {
    failStuck();
  }
}

void Launch::makeReady(size_t thread) {
  threads_[thread].state = State::kReady;
  ready_.push_back(thread);
}

void Launch::suspend(State state) {
  threads_[current_].state = state;
  if (state == State::kReady) {
    ready_.push_back(current_);
  }
  threads_[current_].fiber->suspend();
}

void Launch::pause() {
  if (random_.below(kPauseEvery) == 0) {
    suspend(State::kReady);
  }
}

void* Launch::shareArray(const void* tag, size_t bytes) {
  for (auto& [known, array] : shared_) {
    if (known == tag) {
      return array.data();
    }
  }
  shared_.emplace_back(tag, std::vector<std::byte>(bytes, kPoison));
  return shared_.back().second.data();
}

void Launch::meetBlock(Site site) {
  threads_[current_].site = site;
  inBlock_ += 1;
  if (inBlock_ < threads_.size()) {
    suspend(State::kInBlock);
    return;
  }
  // The last one goes on with the others, in any order.
  threads_[current_].state = State::kInBlock;
  for (const Thread& thread : threads_) {
    if (!isSamePlace(thread.site, site)) {
      failStuck();
    }
  }
  releaseBlock();
  threads_[current_].fiber->suspend();
}

void Launch::releaseBlock() {
  inBlock_ = 0;
  for (size_t i = 0; i < threads_.size(); ++i) {
    makeReady(i);
  }
}

uint64_t Launch::meetWarp(
    WarpCall call, unsigned mask, uint64_t value, unsigned lane, Site site) {
  const size_t first = current_ / kWarpLanes * kWarpLanes;
  const size_t own = current_ - first;
  // Of a last warp with fewer threads, the missing lanes may be named.
  const size_t lanes = std::min<size_t>(kWarpLanes, threads_.size() - first);
  const unsigned existing = lanes == kWarpLanes ? ~0U : (1U << lanes) - 1;
  if ((mask >> own & 1U) == 0) {
    fail("calls for lanes " + std::to_string(mask) + " without its own");
  }
  Thread& thread = threads_[current_];
  thread.call = call;
  thread.mask = mask & existing;
  thread.lane = lane;
  thread.value = value;
  thread.site = site;
  thread.state = State::kInWarp;
  if (isWarpComplete(first, thread)) {
    releaseWarp(first, thread.mask);
  }
  thread.fiber->suspend();
  return thread.value;
}

bool Launch::isWarpComplete(size_t first, const Thread& last) const {
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    if ((last.mask >> lane & 1U) == 0) {
      continue;
    }
    const Thread& thread = threads_[first + lane];
    if (thread.state != State::kInWarp || thread.call != last.call ||
        thread.mask != last.mask || !isSamePlace(thread.site, last.site)) {
      return false;
    }
  }
  return true;
}

uint64_t Launch::resultOf(size_t first, const Thread& thread) const {
  if (thread.call == WarpCall::kShuffle) {
    if ((thread.mask >> thread.lane & 1U) == 0) {
      fail(
          "a shuffle reads lane " + std::to_string(thread.lane) +
          ", which is not among the lanes " + std::to_string(thread.mask));
    }
    return threads_[first + thread.lane].value;
  }
  uint64_t lanes = 0;
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    if ((thread.mask >> lane & 1U) != 0) {
      const uint64_t value = threads_[first + lane].value;
      const bool isIn =
          thread.call == WarpCall::kMatch ? value == thread.value : value != 0;
      lanes |= uint64_t{isIn ? 1U : 0U} << lane;
    }
  }
  return lanes;
}

void Launch::releaseWarp(size_t first, unsigned mask) {
  uint64_t results[kWarpLanes] = {};
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    if ((mask >> lane & 1U) != 0) {
      results[lane] = resultOf(first, threads_[first + lane]);
    }
  }
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    if ((mask >> lane & 1U) != 0) {
      threads_[first + lane].value = results[lane];
      makeReady(first + lane);
    }
  }
}

void Launch::failStuck() const {
  const auto waiting =
      std::find_if(threads_.begin(), threads_.end(), [](const Thread& thread) {
        return thread.state != State::kEnded;
      });
  const auto first = static_cast<size_t>(waiting - threads_.begin());
  std::string text = where(first) + " " + stateOf(first);
  for (size_t i = 0; i < threads_.size(); ++i) {
    if (threads_[i].state != waiting->state ||
        !isSamePlace(threads_[i].site, waiting->site)) {
      text += ", but thread " + std::to_string(i) + " " + stateOf(i);
      break;
    }
  }
  throw std::runtime_error(text);
}

}  // namespace automoe::emulated
