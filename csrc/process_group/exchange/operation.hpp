// SPDX-License-Identifier: Apache-2.0
// One posted collective, as its caller sees it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <string>

namespace automoe {

/// How the caller hears of the end. Each is called once, by whichever thread
/// drives the engine, under its lock: they must neither block nor throw.
struct OperationCallbacks {
  /// The bytes are there: completes the caller's result before anybody can see
  /// the operation as finished. Not called after a failure.
  std::function<void()> completing;
  /// The result, or the error, is there.
  std::function<void()> finished;
  /// The engine will not touch the caller's memory any more (at the end or,
  /// after a failure, once sends under way have left).
  std::function<void()> released;
};

class Operation {
 public:
  using Clock = std::chrono::steady_clock;

  Operation(uint64_t sequence, Clock::time_point deadline)
      : sequence_(sequence), deadline_(deadline), begun_(Clock::now()) {}
  virtual ~Operation() = default;
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

  /// Thread-safe, does not need the engine's lock.
  bool finished() const { return finished_.load(std::memory_order_acquire); }
  /// Null when it succeeded; only once finished().
  std::exception_ptr error() const { return error_; }
  uint64_t sequence() const { return sequence_; }
  Clock::time_point deadline() const { return deadline_; }
  /// Of the own call, or of another rank's first record before it.
  Clock::time_point begun() const { return begun_; }
  /// Only once finished().
  Clock::time_point ended() const { return ended_; }
  /// What it still waits for, for error texts; with the engine's lock.
  virtual std::string waitsFor() const = 0;

  // The rest is for the exchange, with the engine's lock.

  void setCallbacks(OperationCallbacks callbacks) {
    callbacks_ = std::move(callbacks);
  }
  void setDeadline(Clock::time_point deadline) { deadline_ = deadline; }
  /// Ends it, once; later calls change nothing.
  void finish(std::exception_ptr error);
  /// The caller's memory is in use from pin() to unpin().
  void pin() { pins_ += 1; }
  void unpin();

 private:
  const uint64_t sequence_;
  Clock::time_point deadline_;
  const Clock::time_point begun_;
  Clock::time_point ended_;
  std::atomic<bool> finished_{false};
  std::exception_ptr error_;
  OperationCallbacks callbacks_;
  int pins_ = 1;  // its own, until finish()
};

/// From now; a timeout that means "never" does not overflow.
Operation::Clock::time_point deadlineAfter(std::chrono::milliseconds timeout);

}  // namespace automoe
