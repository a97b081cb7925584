// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/partial_sums.hpp"

#include <algorithm>
#include <cstring>

#include "kernels/reduce.hpp"

namespace automoe {
namespace {

void append(std::vector<std::byte>& to, const std::byte* from, size_t bytes) {
  to.insert(to.end(), from, from + bytes);
}

template <class T>
std::byte* put(std::byte* to, const std::vector<T>& from) {
  if (!from.empty()) {
    std::memcpy(to, from.data(), from.size() * sizeof(T));
  }
  return to + from.size() * sizeof(T);
}

}  // namespace

PartialSums::PartialSums(
    const Route& route,
    const CombineArguments& arguments,
    const Topology& topology)
    : route_(route),
      arguments_(arguments),
      localRank_(topology.localRank()),
      units_(combineUnits(route, arguments, topology, topology.rank())),
      counts_(static_cast<size_t>(topology.localSize())),
      cursors_(counts_.size()),
      zeros_(arguments.rowBytes()) {
  countEntries();
}

void PartialSums::advance() {
  at_ += 1;
  countEntries();
}

void PartialSums::countEntries() {
  std::fill(counts_.begin(), counts_.end(), 0);
  if (done()) {
    return;
  }
  for (size_t row = unit().begin; row < unit().end; ++row) {
    for (const int32_t entry : route_.entries(row)) {
      const bool own = entry >= 0 || entry == Route::kDropped;
      counts_[static_cast<size_t>(own ? localRank_ : ~entry)] += 1;
    }
  }
}

size_t PartialSums::bytesOf(int localRank) const {
  return counts_[static_cast<size_t>(localRank)] *
         (arguments_.rowBytes() + arguments_.weightBytes() +
          arguments_.scalarBytes());
}

size_t PartialSums::chunkBytes() const {
  return combineChunkBytes(
      route_,
      arguments_,
      unit().end - unit().begin,
      route_.entryBegin(unit().end) - route_.entryBegin(unit().begin));
}

uint64_t PartialSums::bytesFor(int source) const {
  const size_t begin = route_.landBegin(source);
  const size_t end = route_.landBegin(source + 1);
  return combineChunkBytes(
      route_,
      arguments_,
      end - begin,
      route_.entryBegin(end) - route_.entryBegin(begin));
}

bool PartialSums::isOneUnit(int source) const {
  const auto count =
      std::count_if(units_.begin(), units_.end(), [&](const CombineUnit& it) {
        return it.source == source;
      });
  return count == 1;
}

void PartialSums::make(
    std::span<const std::byte* const> mateRows, std::byte* chunk) {
  openCursors(mateRows);
  tailWeights_.clear();
  tailRanks_.clear();
  tailScalars_.clear();
  std::byte* at = chunk;
  for (size_t row = unit().begin; row < unit().end; ++row) {
    rows_.clear();
    weights_.clear();
    for (const int32_t entry : route_.entries(row)) {
      addTerm(entry);
    }
    writeRow(at);
  }
  if (!route_.sumsPerNode()) {
    at = put(at, tailWeights_);
    at = put(at, tailRanks_);
  }
  put(at, tailScalars_);
}

void PartialSums::openCursors(std::span<const std::byte* const> mateRows) {
  for (size_t local = 0; local < counts_.size(); ++local) {
    Cursor& cursor = cursors_[local];
    cursor.row = mateRows[local];
    cursor.weight = cursor.row + counts_[local] * arguments_.rowBytes();
    cursor.scalar = cursor.weight + counts_[local] * arguments_.weightBytes();
  }
}

void PartialSums::addTerm(int32_t entry) {
  const bool dropped = entry == Route::kDropped;
  const bool own = entry >= 0 || dropped;
  const auto local = static_cast<size_t>(own ? localRank_ : ~entry);
  Cursor from;
  if (!own) {
    from = cursors_[local];
    cursors_[local].row += arguments_.rowBytes();
    cursors_[local].weight += arguments_.weightBytes();
    cursors_[local].scalar += arguments_.scalarBytes();
  } else if (dropped) {
    static constexpr std::byte kZero[sizeof(double)] = {};
    from = {zeros_.data(), kZero, kZero};
  } else {
    const auto index = static_cast<size_t>(entry);
    from.row = arguments_.rows + index * arguments_.rowBytes();
    from.weight = arguments_.weights + index * arguments_.weightBytes();
    from.scalar = arguments_.scalars + index * arguments_.scalarBytes();
  }
  rows_.push_back(from.row);
  append(weights_, from.weight, arguments_.weightBytes());
  append(tailScalars_, from.scalar, arguments_.scalarBytes());
  if (!route_.sumsPerNode()) {
    append(tailWeights_, from.weight, arguments_.weightBytes());
    tailRanks_.push_back(static_cast<uint32_t>(local));
  }
}

void PartialSums::writeRow(std::byte*& to) {
  const size_t rowBytes = arguments_.rowBytes();
  if (route_.sumsPerNode()) {
    const auto end = static_cast<uint32_t>(rows_.size());
    kernels::reduceRow(
        arguments_.dtype,
        to,
        rows_,
        weights_.empty() ? nullptr : weights_.data(),
        std::span(&end, 1),
        arguments_.elements);
    to += rowBytes;
    return;
  }
  for (const std::byte* row : rows_) {
    if (rowBytes > 0) {
      std::memcpy(to, row, rowBytes);
    }
    to += rowBytes;
  }
}

}  // namespace automoe
