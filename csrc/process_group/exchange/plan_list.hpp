// SPDX-License-Identifier: Apache-2.0
// What a rank tells a node about its rows there, as bytes on the wire.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace automoe {

/// What all ranks must agree on, and what makes up the fingerprint; 40 bytes
/// that travel in front of every list.
struct PlanFacts {
  int64_t numExperts = 0;
  int64_t topK = 0;
  int64_t numTokens = 0;
  uint64_t idsHash = 0;  // the sum of hashOfId()
  uint64_t mapHash = 0;  // of the reduction map; 0: the topology
  bool operator==(const PlanFacts&) const = default;
};
static_assert(sizeof(PlanFacts) == 40);

/// Of a plan: equal on all ranks. `facts` are those of every rank.
uint64_t fingerprintOf(std::span<const PlanFacts> facts);

/// The rows of one source to this node, in its order. Experts are numbered
/// within the node: those of all its ranks, ascending.
struct PlanList {
  std::vector<int32_t> counts;   // experts of each row
  std::vector<int32_t> experts;  // of all rows, one after the other
};

/// Facts, number of rows (4 bytes), a count for each row, the experts. A count
/// takes 1, 2 or 4 bytes as topK needs, an expert as numExperts of the node
/// needs. rowBegin has one item more than there are rows; it begins anywhere.
std::string encodePlanList(
    const PlanFacts& facts,
    std::span<const int32_t> rowBegin,
    std::span<const int32_t> experts,
    int64_t numExpertsOnNode);

/// The facts in front of a list. Throws TransportError naming the source.
PlanFacts readPlanFacts(int source, std::span<const std::byte> list);

/// The rows behind the facts. Throws TransportError naming the source unless
/// all bytes make sense.
PlanList decodePlanList(
    int source,
    const PlanFacts& facts,
    std::span<const std::byte> list,
    int64_t numExpertsOnNode);

}  // namespace automoe
