// SPDX-License-Identifier: Apache-2.0
// Rows to their experts, on a device.
#include <utility>

#include "process_group/exchange/device_moves.hpp"

namespace automoe {

ColumnLayout::ColumnLayout(
    const std::vector<DeviceColumn>& columns, std::vector<size_t> counts) {
  for (size_t i = 0; i < columns.size(); ++i) {
    offsets_.push_back(bytes_);
    bytes_ += (counts[i] * columns[i].bytes + 255) / 256 * 256;
  }
}

namespace {

std::vector<DeviceColumn> columnsOf(const DispatchArguments& arguments) {
  std::vector<DeviceColumn> columns;
  for (const DispatchArguments::Field& field : arguments.fields) {
    columns.push_back({field.from, field.to, field.rowBytes, false});
  }
  if (arguments.weightBytes > 0) {
    columns.push_back(
        {arguments.weights,
         arguments.receivedWeights,
         arguments.weightBytes,
         true});
  }
  return columns;
}

class DeviceDispatch {
 public:
  DeviceDispatch(
      const DeviceLane& lane,
      const DeviceRoute& lists,
      const Route& route,
      const DispatchArguments& arguments)
      : lane_(lane),
        on_(lists),
        lists_(lists.lists()),
        route_(route),
        packed_(arguments.packed),
        columns_(columnsOf(arguments)),
        outgoing_(columns_, counts(route.numSendRows(), numSlots())) {}

  void enqueue() {
    std::vector<size_t> needs;
    for (const RouteLists::Area& area : lists_.areas) {
      areas_.emplace_back(columns_, counts(area.landRows, area.landEntries));
      needs.push_back(areas_.back().bytes());
    }
    lane_.memory.begin(needs, lane_.timeout);
    if (lane_.fenced) {
      lane_.memory.fence(lane_.stream, DeviceMemory::Fence::kBegin);
    }
    packForNodes();
    packForMates();
    sendAndReceive();
    lane_.memory.setReady(lane_.stream);
    lane_.memory.awaitReady(lane_.stream);
    take();
    if (lane_.fenced) {
      lane_.memory.fence(lane_.stream, DeviceMemory::Fence::kEnd);
    }
  }

 private:
  std::vector<size_t> counts(size_t rows, size_t entries) const {
    std::vector<size_t> counts;
    for (const DeviceColumn& column : columns_) {
      counts.push_back(column.ofEntries ? entries : rows);
    }
    return counts;
  }
  size_t numSlots() const { return lists_.sendSlots.count; }
  /// Where the send rows, or their slots, for a node begin.
  size_t beginOf(const DeviceColumn& column, int node) const {
    const size_t row = route_.sendBegin(node);
    return column.ofEntries ? route_.sendSlotBegin(row) : row;
  }
  std::byte* ownArea(size_t column) const {
    const auto self = static_cast<size_t>(lane_.topology.localRank());
    return lane_.memory.arena(self) + areas_[self].offset(column);
  }
  /// Packed rows leave from where they are.
  bool inPlace(const DeviceColumn& column) const {
    return packed_ && !column.ofEntries;
  }

  void pack(size_t column, size_t begin, size_t end, std::byte* to) const;
  void packForNodes() const;
  void packForMates() const;
  void sendAndReceive() const;
  void take() const;

  const DeviceLane& lane_;
  const DeviceRoute& on_;
  const RouteLists& lists_;
  const Route& route_;
  const bool packed_;
  const std::vector<DeviceColumn> columns_;
  const ColumnLayout outgoing_;
  std::vector<ColumnLayout> areas_;  // by local rank
};

/// Send rows or slots [begin, end) of a column, to `to`.
void DeviceDispatch::pack(
    size_t column, size_t begin, size_t end, std::byte* to) const {
  if (begin == end) {
    return;
  }
  const DeviceColumn& it = columns_[column];
  if (inPlace(it)) {
    lane_.device.copy(
        lane_.stream, to, it.from + begin * it.bytes, (end - begin) * it.bytes);
    return;
  }
  kernels::GatherRows call;
  call.to = to;
  call.count = end - begin;
  call.rowBytes = it.bytes;
  call.index =
      on_.at(it.ofEntries ? lists_.sendSlots : lists_.sendTokens, begin);
  call.from.at[0] = it.from;
  call.maxBlocks = lane_.maxBlocks;
  lane_.device.run(lane_.stream, [call](kernels::DeviceStream stream) {
    kernels::enqueue(call, stream);
  });
}

void DeviceDispatch::packForNodes() const {
  const int node = lane_.topology.node();
  if (lane_.topology.numNodes() == 1) {
    return;
  }
  std::byte* scratch = lane_.outgoing.atLeast(outgoing_.bytes());
  for (size_t i = 0; i < columns_.size(); ++i) {
    const DeviceColumn& it = columns_[i];
    if (inPlace(it)) {
      continue;
    }
    std::byte* to = scratch + outgoing_.offset(i);
    const size_t own = beginOf(it, node);
    const size_t next = beginOf(it, node + 1);
    const size_t end = beginOf(it, route_.numNodes());
    pack(i, 0, own, to);
    pack(i, next, end, to + next * it.bytes);
  }
}

void DeviceDispatch::packForMates() const {
  if (lane_.topology.localSize() == 1) {
    return;
  }
  const int node = lane_.topology.node();
  const RouteLists::Landed& landed =
      lists_.landed[static_cast<size_t>(route_.rank())];
  for (size_t i = 0; i < columns_.size(); ++i) {
    const DeviceColumn& it = columns_[i];
    const size_t first = it.ofEntries ? landed.entryBegin : landed.rowBegin;
    pack(
        i,
        beginOf(it, node),
        beginOf(it, node + 1),
        ownArea(i) + first * it.bytes);
  }
}

void DeviceDispatch::sendAndReceive() const {
  if (lane_.network == nullptr) {
    return;
  }
  const Topology& topology = lane_.topology;
  const std::byte* scratch = lane_.outgoing.atLeast(outgoing_.bytes());
  std::vector<DeviceNetwork::Send> sends;
  std::vector<DeviceNetwork::Receive> receives;
  for (size_t i = 0; i < columns_.size(); ++i) {
    const DeviceColumn& it = columns_[i];
    const std::byte* from =
        inPlace(it) ? it.from : scratch + outgoing_.offset(i);
    for (int hop = 1; hop < topology.numNodes(); ++hop) {
      const int node = (topology.node() + hop) % topology.numNodes();
      const size_t begin = beginOf(it, node);
      const size_t bytes = (beginOf(it, node + 1) - begin) * it.bytes;
      sends.push_back(
          {topology.railPeer(node), from + begin * it.bytes, bytes});
    }
    for (int source = 0; source < topology.size(); ++source) {
      const auto& landed = lists_.landed[static_cast<size_t>(source)];
      if (topology.nodeOf(source) != topology.node() &&
          landed.landing == topology.localRank()) {
        const size_t first = it.ofEntries ? landed.entryBegin : landed.rowBegin;
        const size_t count = it.ofEntries ? landed.entries : landed.rows;
        receives.push_back(
            {source, ownArea(i) + first * it.bytes, count * it.bytes});
      }
    }
  }
  lane_.network->exchange(lane_.stream, sends, receives);
}

void DeviceDispatch::take() const {
  for (size_t i = 0; i < columns_.size(); ++i) {
    const DeviceColumn& it = columns_[i];
    kernels::GatherRows call;
    call.to = it.to;
    call.count = lists_.receiveBases.count;
    call.rowBytes = it.bytes;
    call.base = on_.at(lists_.receiveBases);
    call.index = on_.at(
        it.ofEntries ? lists_.receiveEntries
        : packed_    ? lists_.receivePacked
                     : lists_.receiveRows);
    for (size_t local = 0; local < areas_.size(); ++local) {
      const std::byte* arena = lane_.memory.arena(local);
      call.from.at[local] =
          arena == nullptr ? nullptr : arena + areas_[local].offset(i);
    }
    call.from.at[lists_.own] = it.from;
    call.maxBlocks = lane_.maxBlocks;
    if (call.count > 0) {
      lane_.device.run(lane_.stream, [call](kernels::DeviceStream stream) {
        kernels::enqueue(call, stream);
      });
    }
  }
}

}  // namespace

void enqueueDispatch(
    const DeviceLane& lane,
    const DeviceRoute& lists,
    const Route& route,
    const DispatchArguments& arguments) {
  DeviceDispatch(lane, lists, route, arguments).enqueue();
}

}  // namespace automoe
