// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/combine_units.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace automoe {
namespace {

// One eager message. Not an option: node-mates cut their rows by it too.
constexpr uint64_t kUnitBytes = 60 * 1024;

bool isOwn(int32_t entry) {
  return entry >= 0 || entry == Route::kDropped;
}

size_t rowsPerUnit(const Route& route, const CombineArguments& arguments) {
  const auto topK = static_cast<size_t>(route.topK());
  const size_t most = combineChunkBytes(route, arguments, 1, topK);
  return std::max<uint64_t>(1, kUnitBytes / std::max<size_t>(1, most));
}

}  // namespace

size_t combineChunkBytes(
    const Route& route,
    const CombineArguments& arguments,
    size_t landRows,
    size_t entries) {
  if (route.sumsPerNode()) {
    return landRows * arguments.rowBytes() + entries * arguments.scalarBytes();
  }
  return entries * (arguments.rowBytes() + arguments.weightBytes() +
                    sizeof(uint32_t) + arguments.scalarBytes());
}

std::vector<CombineUnit> combineUnits(
    const Route& route,
    const CombineArguments& arguments,
    const Topology& topology,
    int landing) {
  const int node = topology.node();
  const int nodes = topology.numNodes();
  std::vector<int> sources;
  for (int i = 1; i < nodes; ++i) {
    for (int source : topology.ranksOf((node + i) % nodes)) {
      if (topology.railPeerOf(source, node) == landing) {
        sources.push_back(source);
      }
    }
  }
  sources.push_back(landing);
  const size_t step = rowsPerUnit(route, arguments);
  std::vector<CombineUnit> units;
  bool any = true;
  for (size_t offset = 0; any; offset += step) {
    any = false;
    for (int source : sources) {
      const size_t begin = route.landBegin(source) + offset;
      const size_t end = route.landBegin(source + 1);
      if (begin < end) {
        units.push_back({source, begin, std::min(end, begin + step)});
        any = true;
      }
    }
  }
  return units;
}

RowStream::RowStream(
    const Route& route,
    const CombineArguments& arguments,
    std::vector<CombineUnit> units)
    : route_(route),
      arguments_(arguments),
      units_(std::move(units)),
      entryBytes_(
          arguments.rowBytes() + arguments.weightBytes() +
          arguments.scalarBytes()) {
  for (const CombineUnit& unit : units_) {
    entries_.push_back(entriesIn(unit));
    const size_t bytes = entries_.back() * entryBytes_;
    bytes_ += bytes;
    largestUnit_ = std::max(largestUnit_, bytes);
  }
}

size_t RowStream::entriesIn(const CombineUnit& unit) const {
  size_t count = 0;
  for (size_t row = unit.begin; row < unit.end; ++row) {
    for (const int32_t entry : route_.entries(row)) {
      count += isOwn(entry) ? 1 : 0;
    }
  }
  return count;
}

size_t RowStream::next(size_t room, std::byte* to, uint32_t& numUnits) {
  size_t written = 0;
  numUnits = 0;
  for (; at_ < units_.size(); ++at_) {
    const size_t bytes = entries_[at_] * entryBytes_;
    if (bytes == 0) {
      continue;
    }
    if (written + bytes > room) {
      break;
    }
    write(units_[at_], entries_[at_], to + written);
    written += bytes;
    numUnits += 1;
  }
  return written;
}

void RowStream::write(
    const CombineUnit& unit, size_t entries, std::byte* to) const {
  const size_t rowBytes = arguments_.rowBytes();
  const size_t weightBytes = arguments_.weightBytes();
  const size_t scalarBytes = arguments_.scalarBytes();
  std::byte* rowAt = to;
  std::byte* weightAt = to + entries * rowBytes;
  std::byte* scalarAt = weightAt + entries * weightBytes;
  const auto put =
      [](std::byte*& at, const std::byte* from, int32_t entry, size_t bytes) {
        if (bytes == 0) {
          return;
        }
        if (entry == Route::kDropped) {
          std::memset(at, 0, bytes);
        } else {
          std::memcpy(at, from + static_cast<size_t>(entry) * bytes, bytes);
        }
        at += bytes;
      };
  for (size_t row = unit.begin; row < unit.end; ++row) {
    for (const int32_t entry : route_.entries(row)) {
      if (isOwn(entry)) {
        put(rowAt, arguments_.rows, entry, rowBytes);
        put(weightAt, arguments_.weights, entry, weightBytes);
        put(scalarAt, arguments_.scalars, entry, scalarBytes);
      }
    }
  }
}

}  // namespace automoe
