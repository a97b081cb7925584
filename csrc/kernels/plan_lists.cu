// SPDX-License-Identifier: Apache-2.0
// ListPlan: first what no row takes, then each entry, own slot and own token
// finds its places in all lists by itself.
#include <stdexcept>
#include <string>

#include "kernels/plan_work.cuh"

namespace automoe::kernels {
namespace {

struct Lists {
  PlanWork work;
  ListPlan to;
};

/// Words of lists before rows are written.
struct Fill {
  static constexpr unsigned kMost = 11;

  struct List {
    int32_t* words;
    size_t count;
    int32_t value;
  };
  List lists[kMost];
  unsigned numLists;
  size_t longest;

  void add(int32_t* words, size_t count, int32_t value) {
    if (words != nullptr) {
      lists[numLists++] = {words, count, value};
      longest = count > longest ? count : longest;
    }
  }
};

__global__ void __launch_bounds__(kPlanThreads)
    fillLists(const __grid_constant__ Fill call) {
  const size_t place = threadNumber();
  for (unsigned i = 0; i < call.numLists; ++i) {
    if (place < call.lists[i].count) {
      call.lists[i].words[place] = call.lists[i].value;
    }
  }
}

__device__ __forceinline__ void put(
    int32_t* list, size_t place, int32_t value) {
  if (list != nullptr) {
    list[place] = value;
  }
}

/// An entry of this node.
struct Entry {
  int32_t spot;
  int32_t token;  // among those of all ranks
  int32_t source;
  RowCounts landed;  // before the entry, of all sources
  RowCounts within;  // the same, of its source
};

__device__ __forceinline__ Entry entryOf(const PlanWork& work, int32_t spot) {
  const PlanIds& of = work.call.of;
  Entry entry;
  entry.spot = spot;
  entry.token = spot / work.topK;
  entry.source = sourceOf(of, entry.token);
  const size_t begin = landSum(of.sources[entry.source].tokenBegin);
  const int32_t i = spot - entry.token * work.topK;
  entry.landed = countsBetween(work, 0, landSum(entry.token));
  entry.landed.slots += i;
  entry.within = countsBetween(work, begin, landSum(entry.token));
  entry.within.slots += i;
  return entry;
}

/// Where an own receive row comes from.
__device__ __forceinline__ void writeReceived(
    const Lists& call, const Entry& entry, size_t row) {
  const PlanIds& of = call.work.call.of;
  const ListPlan& to = call.to;
  put(to.receiveIndex, row, entry.landed.slots);
  const PlanSource& source = of.sources[entry.source];
  if (entry.source != of.rank) {
    const int32_t landRow = source.landRow + entry.within.rows;
    put(to.receiveBases, row, source.landing);
    put(to.receiveRows, row, landRow);
    put(to.receivePacked, row, landRow);
    put(to.receiveEntries, row, source.landEntry + entry.within.slots);
    return;
  }
  const int32_t before = source.tokenBegin * call.work.topK;
  put(to.receiveBases, row, of.mates);
  put(to.receiveRows, row, entry.token - source.tokenBegin);
  if (to.receivePacked != nullptr) {
    to.receivePacked[row] = to.sendRowBegin[of.node] + entry.within.rows;
  }
  put(to.receiveEntries,
      row,
      (entry.token - source.tokenBegin) * call.work.topK +
          call.work.ownSpots[entry.spot - before]);
}

/// One thread for each sorted row, and for each own expert.
__global__ void __launch_bounds__(kPlanThreads)
    placeRows(const __grid_constant__ Lists call) {
  const PlanWork& work = call.work;
  const PlanIds& of = work.call.of;
  const size_t place = threadNumber();
  if (place < static_cast<size_t>(work.ownExperts)) {
    const auto expert = static_cast<int32_t>(place);
    const int32_t begin = rowBeginOf(work, of.localRank);
    const int32_t end =
        work.ends[of.localRank * work.expertsPerRank + expert] - begin;
    put(call.to.offsets, place, clipRow(work, end));
    put(call.to.numTokensPerExpert, place, keptOf(work, expert));
  }
  const int32_t spot = place < work.sortedRows ? work.spotOfRow[place] : -1;
  if (spot < 0) {
    return;
  }
  const int32_t owner = work.spotExperts[spot] / work.expertsPerRank;
  const int32_t row = static_cast<int32_t>(place) - rowBeginOf(work, owner);
  const int64_t most = work.call.maxReceiveRows;
  const bool isKept = most < 0 || row < most;
  work.rowOfSpot[spot] = isKept ? row : -1;
  const auto at = static_cast<size_t>(row);
  if (isKept && owner == of.localRank && at < call.to.receiveCapacity) {
    writeReceived(call, entryOf(work, spot), at);
  }
}

/// Where the terms of a land row are, by its first entry.
__device__ __forceinline__ void writeLandRow(
    const Lists& call, const Entry& entry) {
  const PlanWork& work = call.work;
  const ListPlan& to = call.to;
  const PlanSource& source = work.call.of.sources[entry.source];
  put(to.entryBegins,
      static_cast<size_t>(entry.landed.rows),
      entry.landed.slots);
  const auto row = static_cast<size_t>(source.landRow + entry.within.rows);
  if (source.landing != work.call.of.localRank || row >= to.landRows) {
    return;
  }
  const int32_t begin = source.landEntry + entry.within.slots;
  const size_t token = landSum(entry.token);
  put(to.termBegins, row, begin);
  put(to.termEnds, row, begin + countsBetween(work, token, token + 1).slots);
}

/// One thread for each spot, and one for what ends entryBegins.
__global__ void __launch_bounds__(kPlanThreads)
    listLanded(const __grid_constant__ Lists call) {
  const PlanWork& work = call.work;
  const PlanIds& of = work.call.of;
  const ListPlan& to = call.to;
  const size_t place = threadNumber();
  if (place == work.slots) {
    const RowCounts all =
        countsBetween(work, 0, static_cast<size_t>(of.tokens));
    put(to.entryBegins, static_cast<size_t>(all.rows), all.slots);
  }
  const int32_t expert = place < work.slots ? work.spotExperts[place] : -1;
  if (expert < 0) {
    return;
  }
  const Entry entry = entryOf(work, static_cast<int32_t>(place));
  if (entry.spot == entry.token * work.topK) {
    writeLandRow(call, entry);
  }
  const int32_t owner = expert / work.expertsPerRank;
  const bool isOwn = owner == of.localRank;
  const int32_t row = work.rowOfSpot[place];
  const int32_t ownRow = row < 0 ? INT32_MIN : row;
  put(to.entries,
      static_cast<size_t>(entry.landed.slots),
      isOwn ? ownRow : ~owner);
  const PlanSource& source = of.sources[entry.source];
  const auto term = static_cast<size_t>(source.landEntry + entry.within.slots);
  if (source.landing == of.localRank && term < to.landEntries) {
    put(to.termBases, term, isOwn ? of.mates : owner);
    put(to.termRows, term, row);
  }
}

/// The send rows of an own token, nodes ascending.
__device__ __forceinline__ void writeToken(const Lists& call, int32_t token) {
  const PlanWork& work = call.work;
  const PlanIds& of = work.call.of;
  int32_t next = countsBetween(work, tokenSum(of, 0), tokenSum(of, token)).rows;
  put(call.to.tokenBegins, static_cast<size_t>(token), next);
  if (call.to.tokenTerms == nullptr) {
    return;
  }
  for (int32_t node = 0; node < of.nodes; ++node) {
    const size_t begin = sendSum(of, node, 0);
    const size_t at = sendSum(of, node, token);
    if (countsBetween(work, at, at + 1).rows > 0) {
      call.to.tokenTerms[next++] =
          call.to.sendRowBegin[node] + countsBetween(work, begin, at).rows;
    }
  }
}

/// What ends the lists that have one word more.
__device__ __forceinline__ void writeEnds(const Lists& call) {
  const PlanWork& work = call.work;
  const PlanIds& of = work.call.of;
  const RowCounts sent =
      countsBetween(work, sendSum(of, 0, 0), tokenSum(of, 0));
  put(call.to.tokenBegins, static_cast<size_t>(of.ownTokens), sent.rows);
  put(call.to.slotBegins, static_cast<size_t>(sent.rows), sent.slots);
}

/// A send row, by its first slot.
__device__ __forceinline__ void writeSendRow(
    const Lists& call, int32_t node, int32_t token, RowCounts dense) {
  const PlanWork& work = call.work;
  const PlanIds& of = work.call.of;
  const ListPlan& to = call.to;
  put(to.denseTokens, static_cast<size_t>(dense.rows), token);
  put(to.slotBegins, static_cast<size_t>(dense.rows), dense.slots);
  if (to.sendTokens != nullptr) {
    const int32_t row =
        to.sendRowBegin[node] +
        countsBetween(work, sendSum(of, node, 0), sendSum(of, node, token))
            .rows;
    if (static_cast<size_t>(row) < to.sendRows) {
      to.sendTokens[row] = token;
    }
  }
}

/// The position of an own slot with an expert among those of its token and
/// node, by (expert, k).
__device__ __forceinline__ int32_t
positionOf(const PlanWork& work, int32_t first, int32_t k) {
  const int32_t id = work.ownIds[first + k];
  const int32_t node = work.ownNodes[first + k];
  int32_t before = 0;
  for (int32_t i = 0; i < work.topK; ++i) {
    const int32_t other = work.ownIds[first + i];
    const bool isBefore = other < id || (other == id && i < k);
    before += isBefore && work.ownNodes[first + i] == node ? 1 : 0;
  }
  return before;
}

/// One thread for each own slot, and one for the ends.
__global__ void __launch_bounds__(kPlanThreads)
    listSent(const __grid_constant__ Lists call) {
  const PlanWork& work = call.work;
  const PlanIds& of = work.call.of;
  const ListPlan& to = call.to;
  const size_t place = threadNumber();
  if (place == work.ownSlots) {
    writeEnds(call);
  }
  if (place >= work.ownSlots) {
    return;
  }
  const auto slot = static_cast<int32_t>(place);
  const int32_t token = slot / work.topK;
  const int32_t first = token * work.topK;
  if (slot == first) {
    writeToken(call, token);
  }
  const int32_t node = work.ownNodes[slot];
  if (node < 0) {
    put(to.slotPlaces, place, -1);
    return;
  }
  const size_t own = sendSum(of, node, token);
  const RowCounts dense = countsBetween(work, sendSum(of, 0, 0), own);
  const int32_t position = positionOf(work, first, slot - first);
  if (position == 0) {
    writeSendRow(call, node, token, dense);
  }
  put(to.denseSlots, static_cast<size_t>(dense.slots + position), slot);
  if (to.sendSlotBegin == nullptr) {
    return;
  }
  const int32_t at = to.sendSlotBegin[node] + position +
                     countsBetween(work, sendSum(of, node, 0), own).slots;
  put(to.slotPlaces, place, at);
  if (to.sendSlots != nullptr && static_cast<size_t>(at) < to.sendSlotPlaces) {
    to.sendSlots[at] = slot;
  }
}

Fill fillOf(const ListPlan& call) {
  Fill fill = {};
  fill.add(call.sendTokens, call.sendRows, -1);
  fill.add(call.sendSlots, call.sendSlotPlaces, -1);
  fill.add(call.receiveBases, call.receiveCapacity, 0);
  fill.add(call.receiveRows, call.receiveCapacity, -1);
  fill.add(call.receivePacked, call.receiveCapacity, -1);
  fill.add(call.receiveEntries, call.receiveCapacity, -1);
  fill.add(call.receiveIndex, call.receiveCapacity, -1);
  fill.add(call.termBegins, call.landRows, 0);
  fill.add(call.termEnds, call.landRows, 0);
  fill.add(call.termBases, call.landEntries, 0);
  fill.add(call.termRows, call.landEntries, -1);
  return fill;
}

void check(const ListPlan& call) {
  const bool needsRows = call.sendTokens != nullptr ||
                         call.tokenTerms != nullptr ||
                         call.receivePacked != nullptr;
  const bool needsSlots =
      call.sendSlots != nullptr || call.slotPlaces != nullptr;
  if ((needsRows && call.sendRowBegin == nullptr) ||
      (needsSlots && call.sendSlotBegin == nullptr)) {
    throw std::invalid_argument(
        "ListPlan has no sendRowBegin or no sendSlotBegin, expected the table "
        "of what is listed: send rows or slots");
  }
}

}  // namespace

void enqueue(const ListPlan& call, DeviceStream stream) {
  check(call);
  const Lists lists{workOf(call.counted), call};
  const PlanWork& work = lists.work;
  const auto launchFor =
      [&](const char* name, auto kernel, size_t threads, const auto& with) {
        if (threads > 0) {
          const unsigned blocks = blocksFor(threads, kPlanThreads, 0);
          launch(name, kernel, {blocks, kPlanThreads}, stream, with);
        }
      };
  const Fill fill = fillOf(call);
  launchFor("fillLists", Kernel<fillLists>(), fill.longest, fill);
  const auto experts = static_cast<size_t>(work.ownExperts);
  launchFor(
      "placeRows",
      Kernel<placeRows>(),
      work.sortedRows > experts ? work.sortedRows : experts,
      lists);
  launchFor("listLanded", Kernel<listLanded>(), work.slots + 1, lists);
  launchFor("listSent", Kernel<listSent>(), work.ownSlots + 1, lists);
}

}  // namespace automoe::kernels
