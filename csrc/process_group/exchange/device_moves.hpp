// SPDX-License-Identifier: Apache-2.0
// What a dispatch and a combine enqueue on the stream of a DeviceExchange.
#pragma once

#include <cstdint>
#include <vector>

#include "process_group/device/device.hpp"
#include "process_group/exchange/combine_arguments.hpp"
#include "process_group/exchange/device_memory.hpp"
#include "process_group/exchange/device_reads.hpp"
#include "process_group/exchange/device_route.hpp"
#include "process_group/exchange/device_wire.hpp"
#include "process_group/exchange/row_moves.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe {

/// What a call works with; all of it outlives the call's work.
struct DeviceLane {
  Device& device;
  Device::Stream stream;
  DeviceMemory& memory;
  DeviceNetwork* network;  // null: one node
  DeviceBuffer& outgoing;
  DeviceBuffer& incoming;
  const Topology& topology;
  std::chrono::milliseconds timeout;
  int maxBlocks;
  bool fenced;
  bool captured;
  DeviceWire wire;
  DeviceReads& reads;
};

/// One tensor of a call, where rows of several travel side by side.
struct DeviceColumn {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  uint64_t bytes = 0;      // of a row, or of a value
  bool ofEntries = false;  // a value for each entry, not for each row
};

/// Tensors one after the other in one piece of memory, each aligned to 256
/// bytes; `counts[i]` rows of column i.
class ColumnLayout {
 public:
  ColumnLayout(
      const std::vector<DeviceColumn>& columns, std::vector<size_t> counts);

  size_t bytes() const { return bytes_; }
  size_t offset(size_t column) const { return offsets_[column]; }

 private:
  std::vector<size_t> offsets_;
  size_t bytes_ = 0;
};

/// Block r of `from` to rank r, of whose `to` it becomes the block of this
/// rank.
struct DeviceAllToAllArguments {
  const std::byte* from = nullptr;  // (ranks, blockBytes)
  std::byte* to = nullptr;          // the same
  size_t blockBytes = 0;            // equal on all ranks
};

/// Throw what Device and DeviceNetwork do.
void enqueueDispatch(
    const DeviceLane& lane,
    const DeviceRoute& lists,
    const DispatchArguments& arguments);
void enqueueCombine(
    const DeviceLane& lane,
    const DeviceRoute& lists,
    const CombineArguments& arguments);
/// Of one node.
void enqueueAllToAll(
    const DeviceLane& lane, const DeviceAllToAllArguments& arguments);

}  // namespace automoe
