// SPDX-License-Identifier: Apache-2.0
// Pieces of what is said about ranks and their devices.
#pragma once

#include <string>
#include <vector>

#include "process_group/device/device_facts.hpp"

namespace automoe {

/// Ranks of a group by number, as those who look at them hold them.
using Ranks = std::vector<const DeviceFacts*>;

/// "1 pair" or "3 pairs".
std::string plural(size_t count, const char* noun);
/// "rank 3" or "ranks 0-3, 6".
std::string rankText(const Ranks& ranks);
/// The first of them, and how many more there are.
std::string joinSome(const std::vector<std::string>& texts);
/// Adds a line per rank, and one per note of it.
void explainRanks(const Ranks& ranks, std::vector<std::string>& lines);

}  // namespace automoe
