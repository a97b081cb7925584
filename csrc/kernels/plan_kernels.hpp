// SPDX-License-Identifier: Apache-2.0
// The kernels that make a plan's lists on a device. The ids of all ranks lie
// where this rank's kernels can read them, so each rank makes its lists by
// itself: CountPlan tells how long they are, ListPlan writes them. As in
// device_kernels.hpp, each call enqueues and returns; what is asked of streams
// and memory there holds here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/device_kernels.hpp"

namespace automoe::kernels {

/// What a plan knows of one rank of the group: where it is, and where this node
/// has its ids and takes its rows.
struct PlanSource {
  int32_t node = 0;
  int32_t localRank = 0;   // on its node
  int32_t tokenBegin = 0;  // its first token among those of all ranks
  /// The local rank, on this node, that lands it: itself if it is of this node,
  /// else its rail peer.
  int32_t landing = 0;
  int32_t idsRow = 0;  // its first row in ids.at[landing]
  // Only for ListPlan: where its rows and its entries begin in the land area of
  // the rank that lands it.
  int32_t landRow = 0;
  int32_t landEntry = 0;
};

/// The ids of all ranks' tokens, and which ranks have the experts.
struct PlanIds {
  RowBases ids = {};  // by landing: (rows, topK) int32; read by CountPlan only
  const PlanSource* sources = nullptr;  // (size,) device memory
  int32_t size = 1;                     // ranks of the group
  int32_t rank = 0;                     // this one
  int32_t nodes = 1;
  int32_t node = 0;
  int32_t mates = 1;  // ranks of this node
  int32_t localRank = 0;
  int64_t tokens = 0;     // of all ranks
  int64_t ownTokens = 0;  // of this one
  int64_t topK = 1;
  int64_t experts = 1;
  int64_t expertsPerRank = 1;  // expert e is on rank e / expertsPerRank
  int64_t align = 1;           // of each expert's receive rows
};

/// Counts the rows of a plan. Ids that are neither -1 nor in [0, experts) are
/// taken as -1, and counted.
struct CountPlan {
  PlanIds of = {};
  int64_t maxReceiveRows = -1;  // of each rank; -1: no bound
  int32_t* counts = nullptr;    // (PlanCounts(of).words,) aligned to 8 bytes
  void* scratch = nullptr;  // scratchBytes(call) bytes, as cudaMalloc aligns
};
/// Throws std::invalid_argument when the sizes are not those of a plan or some
/// index can be above 2^31 - 1.
void enqueue(const CountPlan& call, DeviceStream stream);
size_t scratchBytes(const CountPlan& call);

/// Where the counts of a plan begin, in words of CountPlan::counts.
struct PlanCounts {
  constexpr explicit PlanCounts(const PlanIds& of)
      : invalidIds(2 * static_cast<size_t>(of.size)),
        dropped(invalidIds + static_cast<size_t>(of.size)),
        sendBegin(dropped + 1),
        sendSlotBegin(sendBegin + static_cast<size_t>(of.nodes) + 1),
        landBegin(sendSlotBegin + static_cast<size_t>(of.nodes) + 1),
        entryBegin(landBegin + static_cast<size_t>(of.size) + 1),
        receiveRows(entryBegin + static_cast<size_t>(of.size) + 1),
        expertCounts(receiveRows + static_cast<size_t>(of.mates)),
        expertEnds(
            expertCounts + static_cast<size_t>(of.mates * of.expertsPerRank)),
        words(expertEnds + static_cast<size_t>(of.mates * of.expertsPerRank)) {}

  /// (size, 2) of each rank's ids as they came: the sum of hashOfId(), the
  /// lower word first.
  size_t idsHash = 0;
  size_t invalidIds;  // (size,) of each rank
  size_t dropped;     // (1,) own entries that found no room
  /// (nodes + 1,) own send rows, and slots, to the nodes before.
  size_t sendBegin;
  size_t sendSlotBegin;
  /// (size + 1,) land rows, and entries, of the sources before on this node.
  size_t landBegin;
  size_t entryBegin;
  /// (mates,) what each rank of this node would receive without a bound,
  /// padding included.
  size_t receiveRows;
  /// (mates, expertsPerRank) entries of each expert of this node, none where a
  /// rank has fewer; and where its receive rows end among those of its rank,
  /// padding included. Neither is clipped by maxReceiveRows.
  size_t expertCounts;
  size_t expertEnds;
  size_t words;  // of all
};

/// Writes the lists of a plan that CountPlan has counted. They are those of
/// RouteLists and PlanResult where not said otherwise; a list that is null is
/// not wanted. What a capacity has no room for is left out.
///
/// A rank stages all its receive rows in their order, so that a term of a
/// node-mate is one of that mate's receive rows.
struct ListPlan {
  /// As it was enqueued; its counts and scratch are as it left them. `ids` are
  /// not read again; `sources` tell landRow and landEntry now.
  CountPlan counted = {};

  // The origin's side. Send row i of a node is number sendRowBegin[node] + i,
  // its slots follow each other from place sendSlotBegin[node] on. Words of
  // the lists that no row takes are -1.
  const int32_t* sendRowBegin = nullptr;   // (nodes + 1,)
  const int32_t* sendSlotBegin = nullptr;  // (nodes + 1,)
  size_t sendRows = 0;                     // capacity of sendTokens
  size_t sendSlotPlaces = 0;               // capacity of sendSlots
  int32_t* sendTokens = nullptr;           // (sendRows,)
  int32_t* sendSlots = nullptr;            // (sendSlotPlaces,)
  int32_t* tokenBegins = nullptr;          // (ownTokens + 1,)
  int32_t* tokenTerms = nullptr;           // (own send rows,)
  int32_t* slotPlaces = nullptr;           // (ownTokens * topK,)

  // The expert's side. Rows without an entry, and those behind the last: base
  // 0, else -1.
  size_t receiveCapacity = 0;
  int32_t* receiveBases = nullptr;        // (receiveCapacity,)
  int32_t* receiveRows = nullptr;         // the same
  int32_t* receivePacked = nullptr;       // the same
  int32_t* receiveEntries = nullptr;      // the same
  int32_t* receiveIndex = nullptr;        // the same
  int32_t* numTokensPerExpert = nullptr;  // (own experts,)
  int32_t* offsets = nullptr;             // (own experts,)

  // The own land area: the terms of row i are [termBegins[i], termEnds[i]),
  // 0 and 0 for a row that nothing lands in. The base of a term is the local
  // rank of its expert, or `mates` for this rank; its row a receive row there,
  // or -1: dropped. Base 0 and row -1 where no entry is.
  size_t landRows = 0;            // capacity of termBegins and termEnds
  size_t landEntries = 0;         // capacity of termBases and termRows
  int32_t* termBegins = nullptr;  // (landRows,)
  int32_t* termEnds = nullptr;    // (landRows,)
  int32_t* termBases = nullptr;   // (landEntries,)
  int32_t* termRows = nullptr;    // (landEntries,)

  // The sections of a route, without gaps.
  int32_t* denseTokens = nullptr;  // (own send rows,)
  int32_t* slotBegins = nullptr;   // (own send rows + 1,)
  int32_t* denseSlots = nullptr;   // (own slots,)
  int32_t* entryBegins = nullptr;  // (land rows of this node + 1,)
  int32_t* entries = nullptr;      // (entries of this node,)
};
/// Throws std::invalid_argument as CountPlan does.
void enqueue(const ListPlan& call, DeviceStream stream);

/// values[i] = the sum of the values before it, for i in [0, count]; modulo
/// 2^64. values[count] need not be set.
struct ScanCounts {
  uint64_t* values = nullptr;  // (count + 1,)
  size_t count = 0;
  void* scratch = nullptr;  // scratchBytes(call) bytes, as cudaMalloc aligns
};
void enqueue(const ScanCounts& call, DeviceStream stream);
size_t scratchBytes(const ScanCounts& call);

}  // namespace automoe::kernels
