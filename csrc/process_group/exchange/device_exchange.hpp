// SPDX-License-Identifier: Apache-2.0
// Dispatch and combine between the devices of a group, ordered by streams.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "process_group/device/device.hpp"
#include "process_group/exchange/combine_arguments.hpp"
#include "process_group/exchange/device_call.hpp"
#include "process_group/exchange/device_memory.hpp"
#include "process_group/exchange/device_moves.hpp"
#include "process_group/exchange/device_planner.hpp"
#include "process_group/exchange/device_reads.hpp"
#include "process_group/exchange/device_route.hpp"
#include "process_group/exchange/device_setup.hpp"
#include "process_group/exchange/device_turns.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"
#include "process_group/exchange/row_moves.hpp"

namespace automoe {

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
  /// may be null where there is one node. Blocks, at most `timeout` for each
  /// of some steps. Throws as setUpDevices(): the group can then be used on.
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

  /// How fast node-mates are read, by local rank, measured or assumed; until
  /// then, and where it is not known, kernels read.
  void setReadRates(std::vector<std::optional<ReadRates>> rates);
  /// How the last dispatch read them, and why: a line for each.
  std::vector<std::string> describeReads();

  struct Call {
    /// Ends when all ranks have made the call and this rank's streams are
    /// through; its error is for the next one who asks.
    std::shared_ptr<Operation> operation;
    /// Happens when the outputs are there.
    std::shared_ptr<DeviceEvent> done;
    /// Then nobody may ask whether `done` has happened.
    bool captured = false;
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
    /// Of a dispatch; all ranks pass the same.
    DeviceWire wire = DeviceWire::kAsIs;
  };
  struct Planned {
    Call call;
    std::shared_ptr<const DeviceRoute> route;
  };
  /// Collective; the host waits for the others', and, unless maxReceiveTokens
  /// is given, for the device to count. Throws InvalidArgument as
  /// DevicePlanner does.
  Planned plan(const DevicePlanArguments& arguments, Terms terms);
  struct HostLists {
    std::vector<int32_t> words;    // of the route
    std::vector<int32_t> offsets;  // (own experts,) as plan() has made them
  };
  /// What plan() has made, for which the host waits.
  HostLists readBack(const DeviceRoute& route);
  /// As Group::dispatch, but the data is the device's, the route is that of
  /// `lists`, and `route` and `receiveIndex` are not looked at.
  Call dispatch(
      std::shared_ptr<const DeviceRoute> lists,
      const DispatchArguments& arguments,
      Terms terms);
  /// As Group::combine, likewise.
  Call combine(
      std::shared_ptr<const DeviceRoute> lists,
      const CombineArguments& arguments,
      Terms terms);
  /// Equal blocks; only where all ranks are on one node.
  Call allToAll(const DeviceAllToAllArguments& arguments, Terms terms);

 private:
  using Enqueue = std::function<void(const DeviceLane&)>;

  Call post(
      OperationKind kind,
      std::shared_ptr<const DeviceRoute> lists,
      DeviceCallFacts facts,
      Terms terms,
      const Enqueue& enqueue);
  /// Whether the call is captured; what comes next is after its inputs.
  bool begin(const Terms& terms, const DeviceRoute* lists);
  /// Enqueues the work of a turn that has been posted.
  void start(
      DeviceTurn& turn,
      const Terms& terms,
      bool captured,
      const Enqueue& enqueue);
  /// Ends what graphs wait for from node-mates that have left; the group fails
  /// then.
  void checkReplays();
  /// The group fails with the network, which else would be waited for, unless
  /// it fails of the cause first. `since` is when the network was seen to fail.
  void checkNetwork(std::chrono::steady_clock::time_point& since);
  /// Waits for what is on the stream by now. Throws the group's failure.
  void awaitOnHost();
  /// Whether it has happened: not when the group has failed before, or late.
  bool awaitEvent(
      Device::Event event, std::chrono::steady_clock::time_point limit);

  const std::shared_ptr<Engine> engine_;
  const std::shared_ptr<Group> group_;
  const std::shared_ptr<Device> device_;
  const std::unique_ptr<DeviceNetwork> network_;
  const std::chrono::milliseconds timeout_;
  DeviceSetup setup_;
  const Device::Stream stream_;
  const std::unique_ptr<DeviceMemory> memory_;
  std::mutex mutex_;   // of calls; taken before the engine's
  DeviceReads reads_;  // guarded by mutex_
  /// Whether the last call was captured: so it took its turn at the arenas, but
  /// nothing ran. Guarded by mutex_.
  bool afterCapture_ = false;
  const std::shared_ptr<DeviceListPool> lists_;
  std::mutex planMutex_;  // taken before mutex_
  DevicePlanner planner_;
  DeviceBuffer outgoing_;
  DeviceBuffer incoming_;
  DeviceTurns turns_;
};

}  // namespace automoe
