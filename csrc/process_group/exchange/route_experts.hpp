// SPDX-License-Identifier: Apache-2.0
// Which rank has which experts: chunks of ceil(E / P), as DTensor's Shard(0)
// cuts. The last ranks may have fewer or none.
#pragma once

#include <algorithm>
#include <cstdint>

namespace automoe {

inline int64_t expertsPerRank(int64_t numExperts, int numRanks) {
  return (numExperts - 1) / numRanks + 1;
}

inline int64_t numExpertsOf(int rank, int64_t numExperts, int numRanks) {
  const int64_t chunk = expertsPerRank(numExperts, numRanks);
  return std::clamp<int64_t>(numExperts - rank * chunk, 0, chunk);
}

}  // namespace automoe
