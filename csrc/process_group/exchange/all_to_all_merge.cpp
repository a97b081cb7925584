// SPDX-License-Identifier: Apache-2.0
// all_to_all of rows of which many are the same, as when each expert gets a
// row of its own: they cross to a node once. The sender alone decides.
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/all_to_all.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {

void AllToAll::mergeRows(int node) {
  const Topology& topology = group_.topology();
  NodeRide& ride = rides_[static_cast<size_t>(node)];
  if (!ride.large || !group_.mergesRows()) {
    return;
  }
  std::vector<std::span<const std::byte>> blocks;
  uint64_t total = 0;
  uint64_t steps = 0;
  for (int rank : topology.ranksOf(node)) {
    const auto& send = arguments_.sends[static_cast<size_t>(rank)];
    blocks.emplace_back(send.data, send.bytes);
    total += send.bytes;
    steps += send.bytes > 0 ? 1 : 0;
  }
  ride.merged = UniqueRows::find(blocks, arguments_.rowBytes);
  if (!ride.merged.has_value()) {
    return;
  }
  // One step, for the rows of all ranks there, in place of one for each.
  for (int rank : topology.ranksOf(node)) {
    source(rank).waitsForMatch = false;
    source(rank).ridesUnmatched = !source(rank).posted;
    ride.unmatchedRanks += source(rank).posted ? 0 : 1;
  }
  takeSteps(steps - 1);
  GroupCounters& counters = group_.mutableCounters();
  const uint64_t rowBytes = ride.merged->numRows() * ride.merged->rowBytes();
  counters.directBlocks -= steps;
  counters.mergedCasts += 1;
  counters.mergedBytes += total - rowBytes;
  counters.networkPayloadBytes -= total - rowBytes;
  if (ride.unmatchedRanks == 0) {
    sendMerged(node);
  }
}

void AllToAll::sendMerged(int node) {
  NodeRide& ride = rides_[static_cast<size_t>(node)];
  DirectSend job = directSend(group_.topology().railPeer(node));
  job.record.kind = RecordKind::kCast;
  job.record.carrier = Carrier::kInline;
  job.record.receiveBytes = ride.merged->rowBytes();
  job.bytes = ride.merged->bytes();
  job.next = [&ride](Record& record, size_t, std::string& bytes) {
    const size_t chunk = ride.nextChunk++;
    record.rows = ride.merged->chunkRows(chunk);
    bytes.resize(ride.merged->chunkBytes(chunk));
    ride.merged->writeChunk(chunk, reinterpret_cast<std::byte*>(bytes.data()));
    return true;
  };
  group_.engine().transfers().add(std::move(job));
}

void AllToAll::castArrived(
    const Record& record, std::span<const std::byte> payload) {
  if (!posted()) {
    throw TransportError("a chunk came before its operation was posted");
  }
  if (record.carrier == Carrier::kExtent) {
    try {
      takeMerged(record, extentOf(record));
    } catch (const Error&) {
      releaseExtent(record);
      throw;
    }
    releaseExtent(record);
  } else {
    takeMerged(record, payload);
  }
}

void AllToAll::takeMerged(
    const Record& record, std::span<const std::byte> chunk) {
  Source& state = source(record.source);
  const auto& to = arguments_.receives[static_cast<size_t>(record.source)];
  state.got += UniqueRows::take(
      chunk,
      record.receiveBytes,
      static_cast<uint32_t>(group_.topology().localRank()),
      {to.data, to.bytes});
  if (state.got > to.bytes) {
    throw TransportError(
        concat("rank ", record.source, " sent rows of its block twice"));
  }
  if (to.bytes > 0 && state.got == to.bytes && state.posted) {
    received(record.source);
  }
}

}  // namespace automoe
