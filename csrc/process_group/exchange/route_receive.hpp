// SPDX-License-Identifier: Apache-2.0
// Gives every entry of this rank its receive row.
#pragma once

#include <cstdint>
#include <span>

#include "process_group/exchange/route.hpp"

namespace automoe {

/// On entry an item of `entries` that is not negative is a local expert, then
/// its receive row or kDropped; the others stay. Experts lie one after the
/// other, each from a multiple of header.align on, their rows in the order of
/// the entries. With maxReceiveTokens >= 0 there are that many receive rows.
/// Sets numReceiveRows and numDropped of `header` and all of `result` but the
/// route. Throws InvalidArgument when the rows are too many.
void placeReceiveRows(
    std::span<int32_t> entries,
    size_t numLocalExperts,
    int64_t maxReceiveTokens,
    RouteHeader& header,
    PlanResult& result);

}  // namespace automoe
