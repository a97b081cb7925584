// SPDX-License-Identifier: Apache-2.0
// Dispatch and combine between the devices of a group, ordered by streams.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "process_group/device/device.hpp"
#include "process_group/exchange/combine_arguments.hpp"
#include "process_group/exchange/device_call.hpp"
#include "process_group/exchange/device_memory.hpp"
#include "process_group/exchange/device_route.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"
#include "process_group/exchange/row_moves.hpp"

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

struct DeviceLane;

/// All work of a group on one device, on one stream of its own: every rank
/// enqueues the same calls in the same order, so what a call waits for is on
/// the way, and scratch memory is used again without a thought.
///
/// A call enqueues and returns. Its rows go
///   - to another node: packed into scratch memory, by the network, into the
///     arena of the rail peer there, which all its node-mates read;
///   - to a node-mate: through the own arena, which that one reads;
///   - to itself: straight from tensor to tensor;
/// and the sums of a combine the same way back. Only flags and events order
/// this; the host waits for nothing, but for mates where an arena has to grow.
///
/// Thread-safe.
class DeviceExchange {
 public:
  /// Collective over the ranks of the group, each with its device. `network`
  /// may be null where there is one node. Blocks, at most `timeout`.
  DeviceExchange(
      std::shared_ptr<Engine> engine,
      std::shared_ptr<Group> group,
      std::shared_ptr<Device> device,
      std::unique_ptr<DeviceNetwork> network,
      std::chrono::milliseconds timeout);
  /// Waits until the device is through, for the timeout at most, or after a
  /// failure until its waits have been released; then for node-mates to do the
  /// same, for ten seconds at most. Before the group is left, or node-mates are
  /// not heard of any more and memory that they may have open is never freed.
  ~DeviceExchange();
  DeviceExchange(const DeviceExchange&) = delete;
  DeviceExchange& operator=(const DeviceExchange&) = delete;

  Device& device() { return *device_; }
  const Topology& topology() const { return group_->topology(); }

  /// The words of a route, on the device. Throws InvalidArgument for a route
  /// of another group, or one whose nodes send no sums (reduction_map).
  std::shared_ptr<const DeviceRoute> upload(const Route& route);

  struct Call {
    /// Ends when all ranks have made the call and this rank's streams are
    /// through; its error is for the next one who asks.
    std::shared_ptr<Operation> operation;
    /// Happens when the outputs are there.
    std::shared_ptr<DeviceEvent> done;
  };
  /// How a call is made, beside its arguments.
  struct Terms {
    Device::Event after = nullptr;  // the inputs are there; null: they are
    std::chrono::milliseconds timeout{};
    OperationCallbacks callbacks = {};
    int maxBlocks = 0;  // of each kernel; 0: as many as are good
    /// Ends only when node-mates have read what is theirs; always so where the
    /// call is captured into a graph.
    bool fenced = false;
  };
  /// As Group::dispatch, but the data is the device's, the route is that of
  /// `lists`, and `receiveIndex` is not looked at.
  Call dispatch(
      std::shared_ptr<const DeviceRoute> lists,
      const Route& route,
      const DispatchArguments& arguments,
      Terms terms);
  /// As Group::combine, likewise.
  Call combine(
      std::shared_ptr<const DeviceRoute> lists,
      const Route& route,
      const CombineArguments& arguments,
      Terms terms);

 private:
  /// One call whose end has not been seen.
  struct Turn {
    /// kCaptured: nothing runs now, but when its graph does.
    enum class State { kPosting, kEnqueued, kCaptured, kDropped };

    std::shared_ptr<DeviceEvent> done;
    std::shared_ptr<const DeviceRoute> lists;
    std::atomic<State> state{State::kPosting};
    std::shared_ptr<Operation> operation;  // guarded by turnsMutex_
    bool pinned = false;  // the same; the caller's memory, after a failure
  };

  using Enqueue = std::function<void(const DeviceLane&)>;

  Call post(
      OperationKind kind,
      std::shared_ptr<const DeviceRoute> lists,
      const DeviceCallFacts& facts,
      Terms terms,
      const Enqueue& enqueue);
  /// Enqueues the work of a turn that has been posted.
  void start(Turn& turn, const Terms& terms, const Enqueue& enqueue);
  bool through(const Turn& turn) const;
  bool ended(const Turn& turn) const;
  void forgetEnded();
  /// The group has failed: a thread ends what the streams wait for, until they
  /// are through, and then lets the callers' memory go.
  void fail();
  void releaseUntilThrough();
  bool letGo();

  const std::shared_ptr<Engine> engine_;
  const std::shared_ptr<Group> group_;
  const std::shared_ptr<Device> device_;
  const std::unique_ptr<DeviceNetwork> network_;
  const std::chrono::milliseconds timeout_;
  const Device::Stream stream_;
  std::mutex mutex_;  // of calls; taken before the engine's
  std::optional<DeviceMemory> memory_;
  const std::shared_ptr<DeviceListPool> lists_;
  /// Of calls in graphs, which read them at every replay: kept to the end.
  std::vector<std::shared_ptr<const DeviceRoute>> captured_;
  DeviceBuffer outgoing_;
  DeviceBuffer incoming_;
  std::mutex turnsMutex_;  // taken after the engine's
  std::deque<std::shared_ptr<Turn>> turns_;
  std::atomic<bool> failed_{false};
  std::atomic<bool> ending_{false};
  std::thread releaser_;
};

}  // namespace automoe
