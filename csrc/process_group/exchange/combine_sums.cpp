// SPDX-License-Identifier: Apache-2.0
// What a landing rank does in a combine.
#include <memory>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/combine.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {
namespace {

// Sums that are made ahead of the links: more hides unequal links, less keeps
// them in the cache.
constexpr uint64_t kMadeAhead = 2 * 1024 * 1024;

}  // namespace

bool Combine::unitReady() const {
  const Topology& topology = group_.topology();
  for (int rank : topology.ranksOf(topology.node())) {
    if (rank != topology.rank() && peer(rank).slots.empty() &&
        partials_->bytesOf(topology.localRankOf(rank)) > 0) {
      return false;
    }
  }
  return true;
}

void Combine::makeSums() {
  while (!partials_->done() && chunkBytes_ < kMadeAhead && unitReady()) {
    makeUnit();
  }
  outputProgressed();
}

void Combine::outputProgressed() {
  if (!outputDone_ && tokens_->done()) {
    outputDone_ = true;
    stepDone();
  }
}

void Combine::makeUnit() {
  const Topology& topology = group_.topology();
  const auto mates = topology.ranksOf(topology.node());
  std::vector<const std::byte*> mateRows(mates.size(), nullptr);
  for (size_t local = 0; local < mates.size(); ++local) {
    const uint64_t bytes = partials_->bytesOf(static_cast<int>(local));
    if (mates[local] == topology.rank() || bytes == 0) {
      continue;
    }
    const Slot& slot = peer(mates[local]).slots.front();
    if (bytes > slot.record.bytes - slot.at) {
      throw TransportError(concat(
          "rows of rank ", mates[local], " end before those of a unit do"));
    }
    mateRows[local] = extentOf(slot.record).data() + slot.at;
  }
  const CombineUnit unit = partials_->unit();
  const uint64_t first = unit.begin - route_->landBegin(unit.source);
  const auto rows = static_cast<uint32_t>(unit.end - unit.begin);
  const size_t bytes = partials_->chunkBytes();
  if (unit.source == topology.rank()) {
    auto chunk = std::make_unique_for_overwrite<std::byte[]>(bytes);
    partials_->make(mateRows, chunk.get());
    tokens_->arrived(topology.node(), first, rows, std::move(chunk), bytes);
  } else {
    Chunk chunk{first, rows, std::string(bytes, '\0')};
    partials_->make(mateRows, reinterpret_cast<std::byte*>(chunk.bytes.data()));
    keep(unit.source, std::move(chunk));
  }
  for (size_t local = 0; local < mates.size(); ++local) {
    const uint64_t used = partials_->bytesOf(static_cast<int>(local));
    if (mates[local] != topology.rank() && used > 0) {
      useSlot(mates[local], used);
    }
  }
  partials_->advance();
}

void Combine::keep(int rank, Chunk chunk) {
  Peer& to = peer(rank);
  if (!to.deferred) {
    chunkBytes_ += chunk.bytes.size();
    to.chunks.push_back(std::move(chunk));
    return;
  }
  to.deferred = false;
  Record record = describe(rank);
  record.carrier = Carrier::kInline;
  record.sendBytes = chunk.bytes.size();
  record.offset = chunk.first;
  record.rows = chunk.rows;
  sendRecord(rank, record, std::move(chunk.bytes));
  stepDone();
}

void Combine::useSlot(int rank, uint64_t bytes) {
  Slot& slot = peer(rank).slots.front();
  slot.at += bytes;
  slot.unitsLeft -= 1;
  if (slot.unitsLeft == 0) {
    if (slot.at != slot.record.bytes) {
      throw TransportError(
          concat("rank ", rank, " brought more rows than it has"));
    }
    releaseExtent(slot.record);
    peer(rank).slots.pop_front();
  }
}

}  // namespace automoe
