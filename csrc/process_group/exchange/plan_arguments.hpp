// SPDX-License-Identifier: Apache-2.0
// What a rank may ask of a plan.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "process_group/exchange/route.hpp"

namespace automoe {

/// Throw InvalidArgument naming the argument, what was got and expected. Do not
/// look at the ids themselves; O(1). The first looks at the sizes alone.
void checkPlanSizes(const PlanArguments& arguments);
void checkPlanArguments(const PlanArguments& arguments);

/// The labels as 0.. in the order of their values; those of the topology when
/// there are none. Throws InvalidArgument unless there is one, and none
/// negative, for each rank.
std::vector<int32_t> canonicalReductionMap(
    std::span<const int32_t> labels, std::span<const int32_t> nodeOfRank);

/// PlanFacts::mapHash of a canonical map.
uint64_t hashReductionMap(
    std::span<const int32_t> map, std::span<const int32_t> nodeOfRank);

}  // namespace automoe
