// SPDX-License-Identifier: Apache-2.0
// A route as the lists that kernels on a device go by: every row and every sum
// finds by itself what it is made of, so all of them can be made at once. Pure.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "process_group/exchange/route.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe {

/// On a device every rank of a node has two areas that its node-mates read.
///
/// The *land area* of a rank takes what it lands: the rows of the sources of
/// other nodes that it is the rail peer of, and its own rows for its node; by
/// source, ascending, then in the order of the land rows. Beside a row there is
/// a value for each of its entries.
///
/// The *stage area* of a rank takes its receive rows that node-mates sum: as
/// stageRows lists them, by the local rank of the mate that lands them and then
/// in the order of that mate's entries; or, without stageRows, all receive rows
/// as they are.
///
/// Local ranks name the areas (a *base*); a base of kOwn stands for the tensor
/// of the call itself.
struct RouteLists {
  struct Area {
    size_t landRows = 0;
    size_t landEntries = 0;
    size_t stageRows = 0;
  };
  /// What one source has in the area of the rank that lands it.
  struct Landed {
    int landing = 0;  // local rank
    size_t rowBegin = 0;
    size_t rows = 0;
    size_t entryBegin = 0;
    size_t entries = 0;
  };
  /// A part of `words`.
  struct List {
    size_t begin = 0;
    size_t count = 0;
  };

  // What the host knows.
  int rank = 0;
  uint64_t fingerprint = 0;
  size_t numTokens = 0;
  std::vector<size_t> sendRowBegin;   // (nodes + 1,)
  std::vector<size_t> sendSlotBegin;  // (nodes + 1,) of sendSlots
  std::vector<Area> areas;            // by local rank
  std::vector<Landed> landed;         // by source
  /// By local rank: how many receive rows come from its area. Empty where the
  /// device has made the lists, and it is not known.
  std::vector<size_t> receivedFrom;
  int32_t own = 0;  // the base kOwn: the number of node-mates

  // The origin's side: what it sends, and how it sums what comes back.
  List sendTokens;   // (S,) the token of each send row
  List sendSlots;    // (slots,) the slots of all send rows
  List tokenBegins;  // (T + 1,) where the terms of each token begin
  List tokenTerms;   // (S,) send rows by token, nodes ascending
  List slotPlaces;   // (T * K,) where a slot stands in sendSlots, or -1

  // The expert's side: where each receive row comes from, -1 for padding.
  List receiveBases;    // (R,)
  List receiveRows;     // (R,) row of the area; of own rows the token
  List receivePacked;   // (R,) the same, but of own rows the send row
  List receiveEntries;  // (R,) entry of the area; of own rows the slot

  // Between the two: what is staged, and the terms of each land row.
  List stageRows;   // (staged,) receive rows, -1: dropped
  List termBegins;  // (own land rows + 1,)
  List termEnds;    // (own land rows,); empty: the next one's begin
  List termBases;   // (own land entries,)
  List termRows;    // the same; row of the stage area, or receive row, or -1

  std::vector<int32_t> words;

  size_t numSendRows() const { return sendRowBegin.back(); }
  size_t numReceiveRows() const { return receiveBases.count; }
  std::span<const int32_t> of(const List& list) const {
    return std::span(words).subspan(list.begin, list.count);
  }
};

/// O(words of the route). The topology is that of the route.
RouteLists makeRouteLists(const Route& route, const Topology& topology);

}  // namespace automoe
