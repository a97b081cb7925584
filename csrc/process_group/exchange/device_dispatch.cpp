// SPDX-License-Identifier: Apache-2.0
// Rows to their experts, on a device.
#include <algorithm>
#include <iterator>
#include <utility>

#include "process_group/exchange/device_moves.hpp"
#include "process_group/exchange/fp8_columns.hpp"

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
      const DispatchArguments& arguments)
      : lane_(lane),
        on_(lists),
        lists_(lists.lists()),
        self_(static_cast<size_t>(lane.topology.localRank())),
        own_(lists_.landed[static_cast<size_t>(lists_.rank)]),
        packed_(arguments.packed),
        columns_(columnsOf(arguments)),
        fp8_(
            lane,
            arguments,
            lists_.numSendRows(),
            lists_.areas[self_].landRows),
        outgoing_(columns_, outgoingCounts()) {}

  void enqueue();

 private:
  std::vector<size_t> counts(size_t rows, size_t entries) const {
    std::vector<size_t> counts;
    for (const DeviceColumn& column : columns_) {
      counts.push_back(column.ofEntries ? entries : rows);
    }
    return counts;
  }
  /// Of what is gathered for other nodes.
  std::vector<size_t> outgoingCounts() const {
    auto counts = this->counts(lists_.numSendRows(), lists_.sendSlots.count);
    for (size_t i = 0; i < counts.size(); ++i) {
      if (fp8_.has(i) || inPlace(columns_[i])) {
        counts[i] = 0;
      }
    }
    return counts;
  }
  /// Where the send rows, or their slots, for a node begin.
  size_t beginOf(const DeviceColumn& column, int node) const {
    const auto& begins =
        column.ofEntries ? lists_.sendSlotBegin : lists_.sendRowBegin;
    return begins[static_cast<size_t>(node)];
  }
  std::byte* ownArea(size_t column) const {
    return lane_.memory.arena(self_) + areas_[self_].offset(column);
  }
  /// Packed rows leave from where they are.
  bool inPlace(const DeviceColumn& column) const {
    return packed_ && !column.ofEntries;
  }
  /// Where send row 0 of what goes to other nodes lies.
  const std::byte* sendRows(size_t column) const {
    return inPlace(columns_[column]) ? columns_[column].from
                                     : scratch_ + outgoing_.offset(column);
  }

  void pack(size_t column, size_t begin, size_t end, std::byte* to) const;
  void packForNodes() const;
  void packForMates() const;
  std::vector<DeviceColumn> carried() const;
  void sendAndReceive() const;
  void dequantize() const;
  void chooseReads() const;
  std::vector<const std::byte*> bringAreas() const;
  void take() const;

  const DeviceLane& lane_;
  const DeviceRoute& on_;
  const RouteLists& lists_;
  const size_t self_;
  const RouteLists::Landed& own_;  // of this rank's own tokens
  const bool packed_;
  const std::vector<DeviceColumn> columns_;
  Fp8Columns fp8_;
  const ColumnLayout outgoing_;
  std::vector<ColumnLayout> areas_;  // by local rank
  std::byte* scratch_ = nullptr;     // outgoing
};

void DeviceDispatch::enqueue() {
  std::vector<size_t> needs;
  for (const RouteLists::Area& area : lists_.areas) {
    areas_.emplace_back(columns_, counts(area.landRows, area.landEntries));
    needs.push_back(areas_.back().bytes());
  }
  lane_.memory.begin(needs, lane_.timeout);
  if (lane_.fenced) {
    lane_.memory.fence(lane_.stream, DeviceMemory::Fence::kBegin);
  }
  if (lane_.network != nullptr) {
    scratch_ = lane_.outgoing.atLeast(outgoing_.bytes() + fp8_.sendBytes());
    fp8_.place(
        scratch_ + outgoing_.bytes(), lane_.incoming.atLeast(fp8_.landBytes()));
    packForNodes();
  }
  packForMates();
  if (lane_.network != nullptr) {
    sendAndReceive();
    dequantize();
  }
  lane_.memory.setReady(lane_.stream);
  lane_.memory.awaitReady(lane_.stream);
  take();
  if (lane_.fenced) {
    lane_.memory.fence(lane_.stream, DeviceMemory::Fence::kEnd);
  }
}

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
  for (size_t i = 0; i < columns_.size(); ++i) {
    const DeviceColumn& it = columns_[i];
    const size_t own = beginOf(it, node);
    const size_t next = beginOf(it, node + 1);
    const size_t end = beginOf(it, lane_.topology.numNodes());
    if (fp8_.has(i)) {
      const int32_t* index = inPlace(it) ? nullptr : on_.at(lists_.sendTokens);
      fp8_.quantize(i, it.from, index, 0, own);
      fp8_.quantize(i, it.from, index, next, end);
    } else if (!inPlace(it)) {
      std::byte* to = scratch_ + outgoing_.offset(i);
      pack(i, 0, own, to);
      pack(i, next, end, to + next * it.bytes);
    }
  }
}

void DeviceDispatch::packForMates() const {
  if (lane_.topology.localSize() == 1) {
    return;
  }
  const int node = lane_.topology.node();
  for (size_t i = 0; i < columns_.size(); ++i) {
    const DeviceColumn& it = columns_[i];
    const size_t first = it.ofEntries ? own_.entryBegin : own_.rowBegin;
    pack(
        i,
        beginOf(it, node),
        beginOf(it, node + 1),
        ownArea(i) + first * it.bytes);
  }
}

/// What crosses between nodes: from send row 0 to row 0 of the own area, or of
/// scratch memory.
std::vector<DeviceColumn> DeviceDispatch::carried() const {
  std::vector<DeviceColumn> carried;
  for (size_t i = 0; i < columns_.size(); ++i) {
    if (fp8_.has(i)) {
      std::ranges::copy(fp8_.carried(i), std::back_inserter(carried));
    } else {
      const DeviceColumn& it = columns_[i];
      carried.push_back({sendRows(i), ownArea(i), it.bytes, it.ofEntries});
    }
  }
  return carried;
}

void DeviceDispatch::sendAndReceive() const {
  const Topology& topology = lane_.topology;
  std::vector<DeviceNetwork::Send> sends;
  std::vector<DeviceNetwork::Receive> receives;
  for (const DeviceColumn& it : carried()) {
    for (int hop = 1; hop < topology.numNodes(); ++hop) {
      const int node = (topology.node() + hop) % topology.numNodes();
      const size_t begin = beginOf(it, node);
      const size_t bytes = (beginOf(it, node + 1) - begin) * it.bytes;
      sends.push_back(
          {topology.railPeer(node), it.from + begin * it.bytes, bytes});
    }
    for (int source = 0; source < topology.size(); ++source) {
      const auto& landed = lists_.landed[static_cast<size_t>(source)];
      if (topology.nodeOf(source) != topology.node() &&
          landed.landing == topology.localRank()) {
        const size_t first = it.ofEntries ? landed.entryBegin : landed.rowBegin;
        const size_t count = it.ofEntries ? landed.entries : landed.rows;
        receives.push_back(
            {source, it.to + first * it.bytes, count * it.bytes});
      }
    }
  }
  lane_.network->exchange(lane_.stream, sends, receives);
}

/// Into the own area, where node-mates read rows as they are.
void DeviceDispatch::dequantize() const {
  for (size_t i = 0; i < columns_.size(); ++i) {
    if (fp8_.has(i)) {
      fp8_.dequantize(i, ownArea(i), 0, own_.rowBegin);
      fp8_.dequantize(
          i,
          ownArea(i),
          own_.rowBegin + own_.rows,
          lists_.areas[self_].landRows);
    }
  }
}

void DeviceDispatch::chooseReads() const {
  uint64_t rowBytes = 0;
  for (const DeviceColumn& column : columns_) {
    rowBytes += column.bytes;
  }
  DeviceReads& reads = lane_.reads;
  reads.facts = {lane_.maxBlocks, DeviceReads::kRoom, {}};
  for (size_t local = 0; local < areas_.size(); ++local) {
    const bool isMate = local != self_;
    reads.facts.mates.push_back(
        {isMate ? expectedRows(lists_, local) : 0,
         rowBytes,
         isMate ? areas_[local].bytes() : 0});
  }
  reads.choices = automoe::chooseReads(reads.facts, reads.rates);
}

/// The areas of all local ranks, where this rank reads them: in their arenas,
/// or in scratch memory that a copy engine fills.
std::vector<const std::byte*> DeviceDispatch::bringAreas() const {
  chooseReads();
  const auto& choices = lane_.reads.choices;
  const auto byEngine = [&](size_t local) {
    return choices[local].by == ReadChoice::By::kEngine;
  };
  size_t bytes = 0;
  for (size_t local = 0; local < areas_.size(); ++local) {
    bytes += byEngine(local) ? areas_[local].bytes() : 0;
  }
  // Rows that came over the network have left it, as the stream has it.
  std::byte* next = bytes > 0 ? lane_.incoming.atLeast(bytes) : nullptr;
  std::vector<const std::byte*> found;
  for (size_t local = 0; local < areas_.size(); ++local) {
    found.push_back(lane_.memory.arena(local));
    if (byEngine(local)) {
      const size_t area = areas_[local].bytes();
      lane_.device.copy(lane_.stream, next, found.back(), area);
      found.back() = next;
      next += area;
    }
  }
  return found;
}

void DeviceDispatch::take() const {
  const std::vector<const std::byte*> areas = bringAreas();
  for (size_t i = 0; i < columns_.size(); ++i) {
    const DeviceColumn& it = columns_[i];
    kernels::GatherRows call;
    call.to = it.to;
    call.count = lists_.numReceiveRows();
    call.rowBytes = it.bytes;
    call.base = on_.at(lists_.receiveBases);
    call.index = on_.at(
        it.ofEntries ? lists_.receiveEntries
        : packed_    ? lists_.receivePacked
                     : lists_.receiveRows);
    for (size_t local = 0; local < areas_.size(); ++local) {
      call.from.at[local] = areas[local] == nullptr
                                ? nullptr
                                : areas[local] + areas_[local].offset(i);
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
    const DispatchArguments& arguments) {
  DeviceDispatch(lane, lists, arguments).enqueue();
}

}  // namespace automoe
