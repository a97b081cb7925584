// SPDX-License-Identifier: Apache-2.0
// Whether what two ranks posted for one operation fits together.
#pragma once

#include <cstdint>
#include <string>

#include "process_group/exchange/device_wire.hpp"
#include "process_group/exchange/record.hpp"

namespace automoe {

/// One side of a pair, as it has posted.
struct PostedSide {
  int rank;
  uint64_t sendBytes;     // to the other
  uint64_t receiveBytes;  // expected from the other
  uint8_t dtype;
};

/// Empty when the two agree; else which rank sends how much to which, and what
/// that one expects. Both ranks find the same words. Dtypes only matter where
/// anything is sent. `elementBytes` is the own rank's, for the text.
std::string findDisagreement(
    const PostedSide& theirs,
    const PostedSide& own,
    uint32_t elementBytes,
    const char* (*dtypeName)(uint8_t));

/// The same for two ranks' records of one dispatch or combine: plan, bytes of a
/// row, bytes of a weight, dtype.
std::string findRowDisagreement(
    const Record& theirs, const Record& own, const char* (*dtypeName)(uint8_t));

/// What rows of a call on a device become between nodes, a part of `rows` of
/// its record.
uint32_t wireUseOf(DeviceWire wire);
/// The same for that.
std::string findWireDisagreement(const Record& theirs, const Record& own);

/// How a call on a device is made, the rest of `rows`.
uint32_t graphUseOf(bool captured, bool fenced);
/// The same for that.
std::string findGraphDisagreement(const Record& theirs, const Record& own);

/// The same for a message: the record that has come, and the one that this rank
/// would have sent in its place.
std::string findMessageDisagreement(
    const Record& theirs,
    const Record& own,
    const char* (*dtypeName)(uint8_t),
    const char* (*reductionName)(uint8_t));

}  // namespace automoe
