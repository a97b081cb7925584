// SPDX-License-Identifier: Apache-2.0
// How the ranks of a new group find out who shares a node with whom.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "process_group/common/store.hpp"
#include "process_group/exchange/engine.hpp"

namespace automoe {

/// What a group is given for itself; else the process's setting holds.
struct GroupSettings {
  std::string node;  // a pin, see Config::node
  std::optional<bool> mergeRows;
};

/// Collective: every rank of the group calls it with the same store and name.
///
/// Two or three rounds over the store. In the first, ranks say where they can
/// be reached; each then tries to map the memory of every lower rank, which
/// succeeds on its own node only. In the second, each says the lowest rank
/// that it shares memory with: its node's label. If there are several nodes,
/// the third brings network addresses; connections are made later, by the
/// first message. A group of one rank touches no store.
///
/// `globalRanks`, by group rank, are for error texts; empty: the same numbers.
///
/// Throws what the store throws at its timeout, and InvalidArgument when ranks
/// disagree (protocol versions, AUTOMOE_NODE pins that cannot be); the same
/// error on every rank.
std::shared_ptr<Group> joinGroup(
    Engine& engine,
    KeyValueStore& store,
    int rank,
    int size,
    const std::string& name,
    std::chrono::milliseconds timeout,
    std::vector<int> globalRanks = {},
    const GroupSettings& settings = {});

}  // namespace automoe
