// SPDX-License-Identifier: Apache-2.0
// What a rail peer does with a packet for its node.
#pragma once

#include <span>
#include <vector>

#include "process_group/exchange/record.hpp"
#include "process_group/memory/node_memory.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe {

/// Posts to every node-mate what a packet brings for it: its record, a small
/// block with it, larger ones in one extent of node memory that each mate
/// reads its part of and the last one frees. `mates` is by local rank, null
/// for this rank. Throws Error when node memory is full.
void relayPacket(
    const Record& record,
    const Packet& packet,
    const Topology& topology,
    const std::vector<Mate*>& mates,
    NodeMemory& memory);

/// Posts to every node-mate (none is null) a record that is for the whole node
/// and its payload: with the record where it is small, else in one extent that
/// the last reader frees.
void relayCast(
    const Record& record,
    std::span<const std::byte> payload,
    int ownRank,
    const std::vector<Mate*>& mates,
    NodeMemory& memory);

}  // namespace automoe
