// SPDX-License-Identifier: Apache-2.0
// The schedules of the collectives: pure functions of what all ranks know.
//
// Every byte that all ranks of a node need crosses the network to it once, and
// every sum leaves a node once: partial sums over its ranks are taken inside.
// Bits depend on the topology, the sizes and the type alone: sums are taken
// over the ranks of a node, ascending, and then over nodes, ascending; but
// small sums over many nodes go up a tree (kSmallSum, kFewNodes), in which each
// node adds those below it, ascending, to its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/elementwise.hpp"
#include "process_group/exchange/schedule.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe {

/// A rank's part of a gather or scatter.
struct ConstBlock {
  const std::byte* data = nullptr;
  uint64_t bytes = 0;
};
struct Block {
  std::byte* data = nullptr;
  uint64_t bytes = 0;
};

/// Ends on no rank before it has begun on all.
Schedule makeBarrier(const Topology& topology);
/// `data` of the root to `data` of all.
Schedule makeBroadcast(
    const Topology& topology, int root, std::byte* data, uint64_t bytes);
/// to[r] becomes what rank r gives, on the root; empty elsewhere.
Schedule makeGather(
    const Topology& topology,
    int root,
    ConstBlock from,
    std::span<const Block> to);
/// `to` becomes from[own rank] of the root; `from` is empty elsewhere.
Schedule makeScatter(
    const Topology& topology,
    int root,
    std::span<const ConstBlock> from,
    Block to);
/// to[r] becomes what rank r gives, everywhere. `from` may be to[own rank].
/// Blocks may differ in size, but each in the same way on every rank.
Schedule makeAllGather(
    const Topology& topology, ConstBlock from, std::span<const Block> to);
/// `to` becomes the sum on the root; it is scratch elsewhere, or null. It may
/// be `from`.
Schedule makeReduce(
    const Topology& topology,
    const kernels::Reduction& reduction,
    int root,
    const std::byte* from,
    std::byte* to,
    uint64_t bytes);
/// `to` becomes the sum everywhere. It may be `from`.
Schedule makeAllReduce(
    const Topology& topology,
    const kernels::Reduction& reduction,
    const std::byte* from,
    std::byte* to,
    uint64_t bytes);
/// `to` becomes the sum of what every rank has in from[own rank]. Blocks may
/// differ in size, but each in the same way on every rank. `to` may be
/// from[own rank].
Schedule makeReduceScatter(
    const Topology& topology,
    const kernels::Reduction& reduction,
    std::span<const ConstBlock> from,
    Block to);

}  // namespace automoe
