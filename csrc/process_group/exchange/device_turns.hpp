// SPDX-License-Identifier: Apache-2.0
// The calls on a device whose end has not been seen yet, and who looks.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "process_group/device/device.hpp"
#include "process_group/exchange/device_call.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/operation.hpp"

namespace automoe {

/// An event that lives as long as somebody may wait for it.
class DeviceEvent {
 public:
  explicit DeviceEvent(std::shared_ptr<Device> device)
      : device_(std::move(device)), event_(device_->makeEvent()) {}
  ~DeviceEvent() { device_->destroyEvent(event_); }
  DeviceEvent(const DeviceEvent&) = delete;
  DeviceEvent& operator=(const DeviceEvent&) = delete;

  Device::Event get() const { return event_; }

 private:
  const std::shared_ptr<Device> device_;
  const Device::Event event_;
};

/// One call. Calls of one exchange are through in the order of their stream.
class DeviceTurn {
 public:
  DeviceTurn(
      std::shared_ptr<DeviceEvent> done, std::shared_ptr<const void> keeps)
      : done_(std::move(done)), keeps_(std::move(keeps)) {}

  /// Happens when its outputs are there.
  const std::shared_ptr<DeviceEvent>& done() const { return done_; }

 private:
  friend class DeviceTurns;

  /// kCaptured: nothing runs now, but when its graph does. kThrough: it was
  /// dropped, too. kBroken: the device has failed.
  enum class State { kPosting, kEnqueued, kCaptured, kThrough, kBroken };

  const std::shared_ptr<DeviceEvent> done_;
  const std::shared_ptr<const void> keeps_;
  std::atomic<State> state_{State::kPosting};
  std::string error_;  // set before kBroken
  // Guarded by DeviceTurns::mutex_.
  std::shared_ptr<Operation> operation_;
  bool pinned_ = false;  // the caller's memory, after a failure
};

/// A thread asks the device, while there are calls: what the engine's thread
/// sees of it is in memory, so that it never waits for a lock of the device's
/// library. After a failure of the group another one ends what streams wait
/// for, until all calls are through; with calls in graphs, or a device that
/// does not tell, until the end.
/// Thread-safe.
class DeviceTurns {
 public:
  struct Hooks {
    std::function<void()> failed;   // once, by a thread of its own
    std::function<void()> release;  // then every millisecond
    /// Every millisecond while there are calls; with no lock held.
    std::function<void()> waiting = [] {};
    /// Now and then while there are calls in graphs, whose replays the host
    /// does not see; with no lock held.
    std::function<void()> replaying = [] {};
  };
  DeviceTurns(Engine& engine, std::shared_ptr<Device> device, Hooks hooks);
  ~DeviceTurns();
  DeviceTurns(const DeviceTurns&) = delete;
  DeviceTurns& operator=(const DeviceTurns&) = delete;

  // In the order of the stream.

  /// `keeps` is let go when the turn is through; if captured, at the end.
  std::shared_ptr<DeviceTurn> begin(std::shared_ptr<const void> keeps);
  /// What the call asks and tells, to be given to its operation.
  DeviceStreams streamsOf(const std::shared_ptr<DeviceTurn>& turn);
  void posted(DeviceTurn& turn, std::shared_ptr<Operation> operation);
  /// done() is recorded.
  void enqueued(DeviceTurn& turn, bool captured);
  /// Nothing is.
  void drop(DeviceTurn& turn);
  /// done() could not be recorded behind what was enqueued.
  void lose(DeviceTurn& turn);

  /// The group has failed. Neither blocks nor needs a lock but the own one,
  /// which is taken after the engine's.
  void fail();
  bool failed() const { return failed_; }
  /// True once all calls are through; false at `limit`, or after a failure.
  bool awaitThrough(std::chrono::steady_clock::time_point limit);
  /// Nothing comes any more. After a failure waits for calls to be through, at
  /// most `patience`; true if they are: not of a device that has not told.
  bool end(std::chrono::milliseconds patience);

 private:
  using Lock = std::unique_lock<std::mutex>;
  using State = DeviceTurn::State;

  static bool through(const DeviceTurn& turn);
  void watch();
  void look(DeviceTurn& turn);
  void forgetEnded();
  void releaseUntilThrough();

  Engine& engine_;
  const std::shared_ptr<Device> device_;
  const Hooks hooks_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<DeviceTurn>> turns_;
  /// What graphs read at every replay.
  std::vector<std::shared_ptr<const void>> captured_;
  std::atomic<bool> failed_{false};
  std::atomic<bool> lost_{false};  // nobody knows the end of some call
  bool ending_ = false;
  bool stopping_ = false;
  std::thread watcher_;
  std::thread releaser_;
};

}  // namespace automoe
