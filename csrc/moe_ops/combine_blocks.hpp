// SPDX-License-Identifier: Apache-2.0
// A combine as blocks of bytes between ranks that are a node each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "process_group/exchange/combine_arguments.hpp"
#include "process_group/exchange/route.hpp"
#include "process_group/exchange/token_sums.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe {

/// Bytes that this rank sends to each; none to itself. A block holds units in
/// their order, a header before each.
std::vector<int64_t> combineBlockBytes(
    const Route& route,
    const CombineArguments& arguments,
    const Topology& topology);
/// Writes the blocks one after the other, and hands the own units to `sums`.
void packCombineBlocks(
    const Route& route,
    const CombineArguments& arguments,
    const Topology& topology,
    std::span<const int64_t> blockBytes,
    std::byte* to,
    TokenSums& sums);
/// Hands the block that has come from `rank` to `sums`. Throws TransportError
/// for bytes that are no units.
void takeCombineBlock(
    int rank, std::span<const std::byte> block, TokenSums& sums);

}  // namespace automoe
