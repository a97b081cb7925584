// SPDX-License-Identifier: Apache-2.0
// The hash of a rank's ids, as the sum of one number for each: so that the
// threads of a device can share the work. Against mistakes, not against malice.
#pragma once

#include <cstdint>

#include "kernels/row_math.hpp"

namespace automoe::kernels {

/// Of the id at `place`: the last steps of MurmurHash3 (Appleby, 2011) over
/// both.
AUTOMOE_HOST_DEVICE inline uint64_t hashOfId(uint64_t place, int32_t id) {
  uint64_t hash = place << 32 | static_cast<uint32_t>(id);
  hash = (hash ^ (hash >> 33)) * 0xff51afd7ed558ccd;
  hash = (hash ^ (hash >> 33)) * 0xc4ceb9fe1a85ec53;
  return hash ^ (hash >> 33);
}

}  // namespace automoe::kernels
