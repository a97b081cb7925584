// SPDX-License-Identifier: Apache-2.0
// The hash of ids, maps and plans: against mistakes, not against malice.
#pragma once

#include <cstdint>

namespace automoe {

inline constexpr uint64_t kHashSeed = 0x9e3779b97f4a7c15;

/// The hash of what `hash` stands for followed by `value`: the last steps of
/// MurmurHash3 (Appleby, 2011) over both.
inline uint64_t mixHash(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0xff51afd7ed558ccd;
  return hash ^ (hash >> 32);
}

}  // namespace automoe
