// SPDX-License-Identifier: Apache-2.0
// Rows of experts back to their tokens, on a device.
#include <utility>

#include "process_group/exchange/device_moves.hpp"

namespace automoe {
namespace {

std::vector<DeviceColumn> columnsOf(const CombineArguments& arguments) {
  // In this order, which DeviceCombine counts on.
  std::vector<DeviceColumn> columns = {
      {arguments.rows, arguments.out, arguments.rowBytes(), false},
      {arguments.weights, nullptr, arguments.weightBytes(), true},
      {arguments.scalars, arguments.scalarsOut, arguments.scalarBytes(), true}};
  return columns;
}

class DeviceCombine {
 public:
  DeviceCombine(
      const DeviceLane& lane,
      const DeviceRoute& lists,
      const CombineArguments& arguments)
      : lane_(lane),
        on_(lists),
        lists_(lists.lists()),
        arguments_(arguments),
        self_(static_cast<size_t>(lane.topology.localRank())),
        own_(lists_.landed[static_cast<size_t>(lists_.rank)]),
        columns_(columnsOf(arguments)),
        outgoing_(columns_, landed(lists_.areas[self_])),
        incoming_(columns_, {lists_.numSendRows(), 0, lists_.sendSlots.count}) {
  }

  void enqueue();

 private:
  // Columns.
  static constexpr size_t kRows = 0;
  static constexpr size_t kWeights = 1;
  static constexpr size_t kScalars = 2;

  static std::vector<size_t> landed(const RouteLists::Area& area) {
    return {area.landRows, 0, area.landEntries};
  }
  /// A column of what was staged, where a term's base finds it.
  kernels::RowBases staged(size_t column) const;
  std::byte* ownSlice(size_t column) const;
  void run(const kernels::GatherRows& call) const;
  void stage() const;
  void sumLanded(size_t begin, size_t end, std::byte* to) const;
  void takeScalars(size_t begin, size_t end, std::byte* to) const;
  void makeSums() const;
  void sendAndReceive() const;
  void sumTokens() const;

  const DeviceLane& lane_;
  const DeviceRoute& on_;
  const RouteLists& lists_;
  const CombineArguments& arguments_;
  const size_t self_;
  const RouteLists::Landed& own_;  // of this rank's own tokens
  const std::vector<DeviceColumn> columns_;
  const ColumnLayout outgoing_;  // sums for other ranks
  const ColumnLayout incoming_;  // one for each send row
  std::vector<ColumnLayout> areas_;
  std::byte* sums_ = nullptr;  // outgoing
  std::byte* rows_ = nullptr;  // incoming
  std::byte* scalars_ = nullptr;
};

void DeviceCombine::enqueue() {
  std::vector<size_t> needs;
  for (const RouteLists::Area& area : lists_.areas) {
    areas_.emplace_back(
        columns_, std::vector<size_t>(columns_.size(), area.stageRows));
    needs.push_back(areas_.back().bytes());
  }
  lane_.memory.begin(needs, lane_.timeout);
  sums_ = lane_.outgoing.atLeast(outgoing_.bytes());
  std::byte* incoming = lane_.incoming.atLeast(incoming_.bytes());
  rows_ = arguments_.packed ? arguments_.out : incoming;
  scalars_ = incoming + incoming_.offset(kScalars);
  if (lane_.fenced) {
    lane_.memory.fence(lane_.stream, DeviceMemory::Fence::kBegin);
  }
  stage();
  lane_.memory.setReady(lane_.stream);
  lane_.memory.awaitReady(lane_.stream);
  makeSums();
  if (lane_.fenced) {
    lane_.memory.fence(lane_.stream, DeviceMemory::Fence::kEnd);
  }
  sendAndReceive();
  sumTokens();
}

void DeviceCombine::run(const kernels::GatherRows& call) const {
  if (call.count > 0 && call.rowBytes > 0) {
    kernels::GatherRows bounded = call;
    bounded.maxBlocks = lane_.maxBlocks;
    lane_.device.run(lane_.stream, [bounded](kernels::DeviceStream stream) {
      kernels::enqueue(bounded, stream);
    });
  }
}

void DeviceCombine::stage() const {
  for (size_t i = 0; i < columns_.size(); ++i) {
    kernels::GatherRows call;
    call.count = lists_.areas[self_].stageRows;
    call.rowBytes = columns_[i].bytes;
    call.index =
        lists_.stageRows.count > 0 ? on_.at(lists_.stageRows) : nullptr;
    call.from.at[0] = columns_[i].from;
    if (call.count > 0) {
      call.to = lane_.memory.arena(self_) + areas_[self_].offset(i);
    }
    run(call);
  }
}

kernels::RowBases DeviceCombine::staged(size_t column) const {
  kernels::RowBases bases;
  for (size_t local = 0; local < areas_.size(); ++local) {
    const std::byte* arena = lane_.memory.arena(local);
    bases.at[local] =
        arena == nullptr ? nullptr : arena + areas_[local].offset(column);
  }
  bases.at[lists_.own] = columns_[column].from;
  return bases;
}

/// Sums of the own area's land rows [begin, end).
void DeviceCombine::sumLanded(size_t begin, size_t end, std::byte* to) const {
  kernels::ReduceRows call;
  call.dtype = arguments_.dtype;
  call.to = to;
  call.count = end - begin;
  call.elements = arguments_.elements;
  call.termBegin = on_.at(lists_.termBegins, begin);
  call.termEnd =
      lists_.termEnds.count > 0 ? on_.at(lists_.termEnds, begin) : nullptr;
  call.base = on_.at(lists_.termBases);
  call.index = on_.at(lists_.termRows);
  call.rows = staged(kRows);
  call.weighted = arguments_.weighted;
  if (arguments_.weighted) {
    call.weights = staged(kWeights);
  }
  call.maxBlocks = lane_.maxBlocks;
  if (call.count > 0 && call.elements > 0) {
    lane_.device.run(lane_.stream, [call](kernels::DeviceStream stream) {
      kernels::enqueue(call, stream);
    });
  }
}

void DeviceCombine::takeScalars(size_t begin, size_t end, std::byte* to) const {
  kernels::GatherRows call;
  call.to = to;
  call.count = end - begin;
  call.rowBytes = columns_[kScalars].bytes;
  call.base = on_.at(lists_.termBases, begin);
  call.index = on_.at(lists_.termRows, begin);
  call.from = staged(kScalars);
  run(call);
}

/// Where the sums for this rank's own tokens go.
std::byte* DeviceCombine::ownSlice(size_t column) const {
  const auto node = static_cast<size_t>(lane_.topology.node());
  return column == kRows
             ? rows_ + lists_.sendRowBegin[node] * arguments_.rowBytes()
             : scalars_ + lists_.sendSlotBegin[node] * columns_[kScalars].bytes;
}

void DeviceCombine::makeSums() const {
  const uint64_t rowBytes = arguments_.rowBytes();
  const size_t rows = lists_.areas[self_].landRows;
  const size_t ownEnd = own_.rowBegin + own_.rows;
  sumLanded(0, own_.rowBegin, sums_);
  sumLanded(own_.rowBegin, ownEnd, ownSlice(kRows));
  sumLanded(ownEnd, rows, sums_ + ownEnd * rowBytes);
  if (arguments_.withScalars) {
    std::byte* to = sums_ + outgoing_.offset(kScalars);
    const size_t entries = lists_.areas[self_].landEntries;
    const size_t ownLast = own_.entryBegin + own_.entries;
    takeScalars(0, own_.entryBegin, to);
    takeScalars(own_.entryBegin, ownLast, ownSlice(kScalars));
    takeScalars(ownLast, entries, to + ownLast * columns_[kScalars].bytes);
  }
}

void DeviceCombine::sendAndReceive() const {
  if (lane_.network == nullptr) {
    return;
  }
  const Topology& topology = lane_.topology;
  const uint64_t rowBytes = arguments_.rowBytes();
  const uint64_t scalarBytes = columns_[kScalars].bytes;
  const std::byte* scalarSums = sums_ + outgoing_.offset(kScalars);
  std::vector<DeviceNetwork::Send> sends;
  std::vector<DeviceNetwork::Receive> receives;
  for (int source = 0; source < topology.size(); ++source) {
    const auto& landed = lists_.landed[static_cast<size_t>(source)];
    if (topology.nodeOf(source) == topology.node() ||
        landed.landing != topology.localRank()) {
      continue;
    }
    sends.push_back(
        {source, sums_ + landed.rowBegin * rowBytes, landed.rows * rowBytes});
    sends.push_back(
        {source,
         scalarSums + landed.entryBegin * scalarBytes,
         landed.entries * scalarBytes});
  }
  for (int hop = 1; hop < topology.numNodes(); ++hop) {
    const int node = (topology.node() + hop) % topology.numNodes();
    const int peer = topology.railPeer(node);
    const auto at = static_cast<size_t>(node);
    const size_t begin = lists_.sendRowBegin[at];
    const size_t end = lists_.sendRowBegin[at + 1];
    const size_t first = lists_.sendSlotBegin[at];
    const size_t slots = lists_.sendSlotBegin[at + 1] - first;
    receives.push_back(
        {peer, rows_ + begin * rowBytes, (end - begin) * rowBytes});
    receives.push_back(
        {peer, scalars_ + first * scalarBytes, slots * scalarBytes});
  }
  lane_.network->exchange(lane_.stream, sends, receives);
}

void DeviceCombine::sumTokens() const {
  if (!arguments_.packed) {
    kernels::ReduceRows call;
    call.dtype = arguments_.dtype;
    call.to = arguments_.out;
    call.count = lists_.numTokens;
    call.elements = arguments_.elements;
    call.termBegin = on_.at(lists_.tokenBegins);
    call.index = on_.at(lists_.tokenTerms);
    call.rows.at[0] = rows_;
    call.maxBlocks = lane_.maxBlocks;
    if (call.count > 0 && call.elements > 0) {
      lane_.device.run(lane_.stream, [call](kernels::DeviceStream stream) {
        kernels::enqueue(call, stream);
      });
    }
  }
  if (arguments_.withScalars) {
    kernels::GatherRows call;
    call.to = arguments_.scalarsOut;
    call.count = lists_.slotPlaces.count;
    call.rowBytes = columns_[kScalars].bytes;
    call.index = on_.at(lists_.slotPlaces);
    call.from.at[0] = scalars_;
    run(call);
  }
}

}  // namespace

void enqueueCombine(
    const DeviceLane& lane,
    const DeviceRoute& lists,
    const CombineArguments& arguments) {
  DeviceCombine(lane, lists, arguments).enqueue();
}

}  // namespace automoe
