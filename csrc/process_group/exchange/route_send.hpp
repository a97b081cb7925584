// SPDX-License-Identifier: Apache-2.0
// The origin's side of a route, from its own ids alone.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "process_group/topology/topology.hpp"

namespace automoe {

/// The send rows as Route has them.
struct SendRows {
  std::vector<int32_t> begin;      // (numNodes + 1,) of send rows
  std::vector<int32_t> tokens;     // by send row
  std::vector<int32_t> slotBegin;  // by send row, and the end
  std::vector<int32_t> slots;
  /// By slot: its expert, numbered among those of all ranks of its node.
  std::vector<int32_t> nodeExperts;
};

/// topkIds are (T, topK) with at most 2^31 - 1 items. Throws InvalidArgument
/// naming the first illegal id.
SendRows makeSendRows(
    const Topology& topology,
    std::span<const int32_t> topkIds,
    int64_t topK,
    int64_t numExperts);

}  // namespace automoe
