// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/route_receive.hpp"

#include <algorithm>
#include <vector>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

std::vector<int64_t> countEntries(
    std::span<const int32_t> entries, size_t numLocalExperts) {
  std::vector<int64_t> counts(numLocalExperts, 0);
  for (const int32_t expert : entries) {
    if (expert >= 0) {
      counts[static_cast<size_t>(expert)] += 1;
    }
  }
  return counts;
}

/// Where each expert's rows begin, and behind the last one where they end.
std::vector<int64_t> layOut(std::span<const int64_t> counts, int64_t align) {
  std::vector<int64_t> begin{0};
  begin.reserve(counts.size() + 1);
  for (const int64_t count : counts) {
    begin.push_back(begin.back() + (count + align - 1) / align * align);
  }
  return begin;
}

int64_t numRowsOf(
    std::span<const int64_t> begin,
    int64_t maxReceiveTokens,
    const RouteHeader& header) {
  if (maxReceiveTokens >= 0) {
    return maxReceiveTokens;
  }
  if (begin.back() > kMaxRouteLength) {
    throw InvalidArgument(concat(
        "plan: rank ",
        header.rank,
        " would receive ",
        begin.back(),
        " rows (",
        begin.size() - 1,
        " experts, align ",
        header.align,
        "), expected at most ",
        kMaxRouteLength,
        "; max_recv_tokens bounds them"));
  }
  return begin.back();
}

/// Consumes `next`: the first free row of each expert.
int64_t placeEntries(
    std::span<int32_t> entries,
    std::vector<int64_t>& next,
    std::span<int32_t> receiveIndex) {
  const auto numRows = static_cast<int64_t>(receiveIndex.size());
  int64_t numDropped = 0;
  for (size_t i = 0; i < entries.size(); ++i) {
    if (entries[i] < 0) {
      continue;
    }
    const int64_t row = next[static_cast<size_t>(entries[i])]++;
    if (row < numRows) {
      entries[i] = static_cast<int32_t>(row);
      receiveIndex[static_cast<size_t>(row)] = static_cast<int32_t>(i);
    } else {
      entries[i] = Route::kDropped;
      numDropped += 1;
    }
  }
  return numDropped;
}

}  // namespace

void placeReceiveRows(
    std::span<int32_t> entries,
    size_t numLocalExperts,
    int64_t maxReceiveTokens,
    RouteHeader& header,
    PlanResult& result) {
  const auto counts = countEntries(entries, numLocalExperts);
  auto begin = layOut(counts, header.align);
  const int64_t numRows = numRowsOf(begin, maxReceiveTokens, header);
  const auto clip = [&](int64_t row) {
    return static_cast<int32_t>(std::min(row, numRows));
  };
  result.offsets.resize(numLocalExperts);
  result.numTokensPerExpert.resize(numLocalExperts);
  for (size_t expert = 0; expert < numLocalExperts; ++expert) {
    result.offsets[expert] = clip(begin[expert + 1]);
    result.numTokensPerExpert[expert] =
        clip(begin[expert] + counts[expert]) - clip(begin[expert]);
  }
  result.receiveIndex.assign(static_cast<size_t>(numRows), -1);
  header.numReceiveRows = numRows;
  header.numDropped = placeEntries(entries, begin, result.receiveIndex);
}

}  // namespace automoe
