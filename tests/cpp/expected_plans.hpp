// SPDX-License-Identifier: Apache-2.0
// What the kernels of a plan have to make, from the routes that the host makes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "device_plans.hpp"
#include "kernels/ids_hash.hpp"

namespace automoe::plans {

inline int32_t narrow(size_t value) {
  return static_cast<int32_t>(value);
}

/// Puts words in, beginning with word `at`.
inline void put(Ids& words, size_t at, const Ids& values) {
  std::ranges::copy(values, words.begin() + static_cast<ptrdiff_t>(at));
}

inline Ids expectedCounts(const HostPlans& host, int rank, const PlanIds& of) {
  const auto self = static_cast<size_t>(rank);
  const Route& route = host.routes[self];
  const PlanCounts at(of);
  Ids counts(at.words, -1);
  for (size_t source = 0; source < host.routes.size(); ++source) {
    const Ids& ids = host.asked.ids[source];
    uint64_t hash = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
      hash += kernels::hashOfId(i, ids[i]);
    }
    std::memcpy(&counts[at.idsHash + 2 * source], &hash, sizeof(hash));
    const auto invalid = std::ranges::count_if(ids, [&](int32_t id) {
      return id < -1 || id >= host.asked.numExperts;
    });
    counts[at.invalidIds + source] = static_cast<int32_t>(invalid);
  }
  counts[at.dropped] = static_cast<int32_t>(route.numDropped());
  for (int node = 0; node <= route.numNodes(); ++node) {
    const auto i = static_cast<size_t>(node);
    const size_t row = route.sendBegin(node);
    counts[at.sendBegin + i] = narrow(row);
    counts[at.sendSlotBegin + i] = narrow(route.sendSlotBegin(row));
  }
  for (int source = 0; source <= route.size(); ++source) {
    const auto i = static_cast<size_t>(source);
    const size_t row = route.landBegin(source);
    counts[at.landBegin + i] = narrow(row);
    counts[at.entryBegin + i] = narrow(route.entryBegin(row));
  }
  const auto mates = host.topologies[self].ranksOf(of.node);
  const auto width = static_cast<size_t>(of.expertsPerRank);
  for (size_t mate = 0; mate < mates.size(); ++mate) {
    const PlanResult& plan = host.unbounded[static_cast<size_t>(mates[mate])];
    const int32_t rows = narrow(plan.receiveIndex.size());
    Ids experts = plan.numTokensPerExpert;
    Ids ends = plan.offsets;
    experts.resize(width, 0);
    ends.resize(width, rows);
    counts[at.receiveRows + mate] = rows;
    put(counts, at.expertCounts + mate * width, experts);
    put(counts, at.expertEnds + mate * width, ends);
  }
  return counts;
}

/// The lists of a rank: those of the host, moved to where the tables of the
/// call put them.
class ExpectedLists {
 public:
  ExpectedLists(const HostPlans& host, int rank, const RankPlan& call)
      : host_(host),
        self_(static_cast<size_t>(rank)),
        call_(call),
        route_(host.routes[self_]),
        lists_(host.lists[self_]) {
    listSent();
    listReceived();
    listTerms();
    listDense();
  }

  RankPlan::Outputs all;

 private:
  Ids of(const RouteLists::List& list) const {
    const auto words = lists_.of(list);
    return {words.begin(), words.end()};
  }
  int nodeOfSendRow(size_t row) const {
    int node = 0;
    while (row >= route_.sendBegin(node + 1)) {
      ++node;
    }
    return node;
  }
  int32_t sendRow(size_t row) const {
    const int node = nodeOfSendRow(row);
    return call_.sendRowBegin[static_cast<size_t>(node)] +
           narrow(row - route_.sendBegin(node));
  }
  int32_t sendSlot(size_t row, size_t slot) const {
    const int node = nodeOfSendRow(row);
    const size_t begin = route_.sendSlotBegin(route_.sendBegin(node));
    return call_.sendSlotBegin[static_cast<size_t>(node)] +
           narrow(slot - begin);
  }
  /// Row or entry `number` of an area.
  int32_t landed(int32_t base, int32_t number, bool isRow) const {
    for (size_t source = 0; source < lists_.landed.size(); ++source) {
      const RouteLists::Landed& it = lists_.landed[source];
      const size_t begin = isRow ? it.rowBegin : it.entryBegin;
      const size_t end = begin + (isRow ? it.rows : it.entries);
      const auto i = static_cast<size_t>(number);
      if (it.landing == base && i >= begin && i < end) {
        const PlanSource& to = call_.sources[source];
        return (isRow ? to.landRow : to.landEntry) + narrow(i - begin);
      }
    }
    return -9;
  }

  void listSent();
  void listReceived();
  void listTerms();
  void listDense();

  const HostPlans& host_;
  size_t self_;
  const RankPlan& call_;
  const Route& route_;
  const RouteLists& lists_;
};

inline void ExpectedLists::listSent() {
  Ids tokens(static_cast<size_t>(call_.sendRowBegin.back()), -1);
  Ids slots(static_cast<size_t>(call_.sendSlotBegin.back()), -1);
  Ids places = of(lists_.slotPlaces);
  for (size_t row = 0; row < route_.numSendRows(); ++row) {
    tokens[static_cast<size_t>(sendRow(row))] = route_.sendToken(row);
    size_t number = route_.sendSlotBegin(row);
    for (const int32_t slot : route_.sendSlots(row)) {
      const int32_t at = sendSlot(row, number++);
      slots[static_cast<size_t>(at)] = slot;
      places[static_cast<size_t>(slot)] = at;
    }
  }
  Ids terms = of(lists_.tokenTerms);
  for (int32_t& term : terms) {
    term = sendRow(static_cast<size_t>(term));
  }
  all["sendTokens"] = tokens;
  all["sendSlots"] = slots;
  all["tokenBegins"] = of(lists_.tokenBegins);
  all["tokenTerms"] = terms;
  all["slotPlaces"] = places;
}

inline void ExpectedLists::listReceived() {
  Ids bases = of(lists_.receiveBases);
  Ids rows = of(lists_.receiveRows);
  Ids packed = of(lists_.receivePacked);
  Ids entries = of(lists_.receiveEntries);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < 0) {
      continue;
    }
    if (bases[i] == lists_.own) {
      packed[i] = sendRow(static_cast<size_t>(packed[i]));
    } else {
      rows[i] = landed(bases[i], rows[i], true);
      packed[i] = rows[i];
      entries[i] = landed(bases[i], entries[i], false);
    }
  }
  Ids index = host_.results[self_].receiveIndex;
  bases.resize(call_.receiveCapacity, 0);
  for (Ids* const list : {&rows, &packed, &entries, &index}) {
    list->resize(call_.receiveCapacity, -1);
  }
  all["receiveBases"] = bases;
  all["receiveRows"] = rows;
  all["receivePacked"] = packed;
  all["receiveEntries"] = entries;
  all["receiveIndex"] = index;
  all["numTokensPerExpert"] = host_.results[self_].numTokensPerExpert;
  all["offsets"] = host_.results[self_].offsets;
}

/// The rows of node-mates are those that their own routes tell.
inline void ExpectedLists::listTerms() {
  Ids begins(call_.landRows, 0);
  Ids ends(call_.landRows, 0);
  Ids bases(call_.landEntries, 0);
  Ids rows(call_.landEntries, -1);
  const Topology& topology = host_.topologies[self_];
  const auto mates = topology.ranksOf(topology.node());
  for (int source = 0; source < route_.size(); ++source) {
    const PlanSource& it = call_.sources[static_cast<size_t>(source)];
    if (it.landing != topology.localRank()) {
      continue;
    }
    auto row = static_cast<size_t>(it.landRow);
    auto term = static_cast<size_t>(it.landEntry);
    for (size_t i = route_.landBegin(source); i < route_.landBegin(source + 1);
         ++i) {
      begins[row] = narrow(term);
      for (size_t entry = 0; entry < route_.entries(i).size(); ++entry) {
        const int32_t own = route_.entries(i)[entry];
        const bool isMate = own < 0 && own != Route::kDropped;
        const auto mate = static_cast<size_t>(
            isMate ? mates[static_cast<size_t>(~own)] : topology.rank());
        const int32_t to = host_.routes[mate].entries(i)[entry];
        bases[term] = isMate ? ~own : topology.localSize();
        rows[term] = to == Route::kDropped ? -1 : to;
        ++term;
      }
      ends[row++] = narrow(term);
    }
  }
  all["termBegins"] = begins;
  all["termEnds"] = ends;
  all["termBases"] = bases;
  all["termRows"] = rows;
}

inline void ExpectedLists::listDense() {
  Ids slotBegins;
  for (size_t row = 0; row <= route_.numSendRows(); ++row) {
    slotBegins.push_back(narrow(route_.sendSlotBegin(row)));
  }
  Ids entryBegins;
  Ids entries;
  for (size_t row = 0; row <= route_.numLandRows(); ++row) {
    entryBegins.push_back(narrow(route_.entryBegin(row)));
    if (row < route_.numLandRows()) {
      const auto own = route_.entries(row);
      entries.insert(entries.end(), own.begin(), own.end());
    }
  }
  all["denseTokens"] = of(lists_.sendTokens);
  all["slotBegins"] = slotBegins;
  all["denseSlots"] = of(lists_.sendSlots);
  all["entryBegins"] = entryBegins;
  all["entries"] = entries;
}

}  // namespace automoe::plans
