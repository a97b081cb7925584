// SPDX-License-Identifier: Apache-2.0
// Plans by the kernels, emulated: the memory of a node with the ids of all
// ranks, and the calls of one rank on it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/device_memory.hpp"
#include "cuda/emulated_cuda.hpp"
#include "kernels/plan_kernels.hpp"
#include "process_group/exchange/route_lists.hpp"
#include "routes.hpp"

namespace automoe::plans {

using kernels::CountPlan;
using kernels::ListPlan;
using kernels::Memory;
using kernels::PlanCounts;
using kernels::PlanIds;
using kernels::PlanSource;
using routes::draw;
using routes::Ids;
using routes::PlanCase;
using routes::Random;

/// Words of the device; AddressSanitizer knows where they end.
class Words {
 public:
  explicit Words(size_t count) : memory_(count * sizeof(int32_t), 0) {}
  explicit Words(const Ids& words) : Words(words.size()) {
    std::ranges::copy(words, data());
  }

  int32_t* data() { return reinterpret_cast<int32_t*>(memory_.data()); }
  Ids copy() { return {data(), data() + memory_.size() / sizeof(int32_t)}; }

 private:
  Memory memory_;
};

/// A plan of all ranks as the host makes it.
struct HostPlans {
  /// Ids that no expert has are taken as -1.
  explicit HostPlans(const PlanCase& given) : asked(given) {
    PlanCase valid = given;
    for (Ids& ids : valid.ids) {
      for (int32_t& id : ids) {
        id = id >= 0 && id < given.numExperts ? id : -1;
      }
    }
    results = routes::planAll(valid);
    valid.maxReceiveTokens = -1;
    unbounded = routes::planAll(valid);
    for (size_t rank = 0; rank < results.size(); ++rank) {
      topologies.push_back(given.topology(static_cast<int>(rank)));
      routes.emplace_back(results[rank].route);
      lists.push_back(makeRouteLists(routes[rank], topologies[rank]));
    }
  }

  int64_t numTokens(size_t rank) const {
    return static_cast<int64_t>(asked.ids[rank].size()) / asked.topK;
  }

  PlanCase asked;
  std::vector<PlanResult> results;
  std::vector<PlanResult> unbounded;  // the same without maxReceiveTokens
  std::vector<Topology> topologies;
  std::vector<Route> routes;
  std::vector<RouteLists> lists;
};

/// How far apart things lie that need not follow each other.
enum class Spread { kNone, kStatic, kRandom };

/// One rank's call. Everything lies in memory that is poison at first.
class RankPlan {
 public:
  RankPlan(const HostPlans& host, int rank, Spread spread, Random& random)
      : host_(host),
        rank_(static_cast<size_t>(rank)),
        topology_(host.topologies[rank_]),
        spread_(spread),
        random_(random) {
    setSizes();
    placeIds();
    placeAreas();
    placeSendRows();
  }

  /// The counts, which then stand in the memory for list().
  Ids count() {
    Words table = sourceWords(false);
    counts_ = std::make_unique<Words>(PlanCounts(call_.of).words);
    call_.counts = counts_->data();
    call_.of.sources = reinterpret_cast<const PlanSource*>(table.data());
    scratch_ = std::make_unique<Memory>(kernels::scratchBytes(call_), 0);
    call_.scratch = scratch_->data();
    enqueue(call_, nullptr);
    return counts_->copy();
  }

  /// The lists by their names; those that are not wanted stay null.
  using Outputs = std::map<std::string, Ids>;
  Outputs list(const std::function<bool()>& isUnwanted) {
    arenas_.clear();
    call_.of.ids = {};
    Words table = sourceWords(true);
    call_.of.sources = reinterpret_cast<const PlanSource*>(table.data());
    Words rowBegin(sendRowBegin);
    Words slotBegin(sendSlotBegin);
    ListPlan list;
    list.counted = call_;
    list.sendRowBegin = rowBegin.data();
    list.sendSlotBegin = slotBegin.data();
    list.sendRows = static_cast<size_t>(sendRowBegin.back());
    list.sendSlotPlaces = static_cast<size_t>(sendSlotBegin.back());
    list.receiveCapacity = receiveCapacity;
    list.landRows = landRows;
    list.landEntries = landEntries;
    std::map<std::string, Words> outputs;
    for (const auto& [name, member, size] : outputsOf(list)) {
      if (!isUnwanted()) {
        list.*member = outputs.emplace(name, Words(size)).first->second.data();
      }
    }
    enqueue(list, nullptr);
    Outputs copies;
    for (auto& [name, words] : outputs) {
      copies[name] = words.copy();
    }
    return copies;
  }

  const CountPlan& call() const { return call_; }

  // The tables of the call.
  Ids sendRowBegin;
  Ids sendSlotBegin;
  std::vector<PlanSource> sources;
  size_t landRows = 0;
  size_t landEntries = 0;
  size_t receiveCapacity = 0;

 private:
  struct Output {
    const char* name;
    int32_t* ListPlan::*member;
    size_t size;
  };

  void setSizes();
  void placeIds();
  void placeAreas();
  void placeSendRows();
  Words sourceWords(bool withAreas) const;
  std::vector<Output> outputsOf(const ListPlan& list) const;
  int32_t gap() {
    return spread_ == Spread::kRandom
               ? static_cast<int32_t>(draw(random_, 0, 3))
               : 0;
  }

  const HostPlans& host_;
  size_t rank_;
  const Topology& topology_;
  Spread spread_;
  Random& random_;
  CountPlan call_;
  std::vector<Words> arenas_;
  std::unique_ptr<Words> counts_;
  std::unique_ptr<Memory> scratch_;
};

inline void RankPlan::setSizes() {
  PlanIds& of = call_.of;
  of.size = topology_.size();
  of.rank = topology_.rank();
  of.nodes = topology_.numNodes();
  of.node = topology_.node();
  of.mates = topology_.localSize();
  of.localRank = topology_.localRank();
  of.topK = host_.asked.topK;
  of.experts = host_.asked.numExperts;
  of.expertsPerRank = (of.experts + of.size - 1) / of.size;
  of.align = host_.asked.align;
  of.ownTokens = host_.numTokens(rank_);
  call_.maxReceiveRows = host_.asked.maxReceiveTokens;
  for (int source = 0; source < of.size; ++source) {
    PlanSource it;
    it.node = topology_.nodeOf(source);
    it.localRank = topology_.localRankOf(source);
    it.tokenBegin = static_cast<int32_t>(of.tokens);
    it.landing = host_.lists[rank_].landed[static_cast<size_t>(source)].landing;
    sources.push_back(it);
    of.tokens += host_.numTokens(static_cast<size_t>(source));
  }
}

/// Sources lie in the memory of who lands them in any order.
inline void RankPlan::placeIds() {
  std::vector<size_t> order(sources.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::shuffle(order, random_);
  const auto topK = static_cast<size_t>(host_.asked.topK);
  for (int32_t landing = 0; landing < call_.of.mates; ++landing) {
    Ids arena;
    for (const size_t source : order) {
      if (sources[source].landing != landing) {
        continue;
      }
      arena.resize(
          arena.size() + static_cast<size_t>(draw(random_, 0, 3)) * topK, 7777);
      sources[source].idsRow = static_cast<int32_t>(arena.size() / topK);
      const Ids& ids = host_.asked.ids[source];
      arena.insert(arena.end(), ids.begin(), ids.end());
    }
    arenas_.emplace_back(arena);
    call_.of.ids.at[landing] =
        reinterpret_cast<const std::byte*>(arenas_.back().data());
  }
}

inline void RankPlan::placeAreas() {
  const RouteLists& lists = host_.lists[rank_];
  std::vector<int32_t> rows(lists.areas.size(), 0);
  std::vector<int32_t> entries(lists.areas.size(), 0);
  for (size_t source = 0; source < sources.size(); ++source) {
    PlanSource& it = sources[source];
    const RouteLists::Landed& landed = lists.landed[source];
    int32_t& row = rows[static_cast<size_t>(it.landing)];
    int32_t& entry = entries[static_cast<size_t>(it.landing)];
    row += gap();
    entry += gap();
    it.landRow = row;
    it.landEntry = entry;
    const auto tokens = static_cast<int32_t>(host_.numTokens(source));
    const bool isStatic = spread_ == Spread::kStatic;
    row += isStatic ? tokens : static_cast<int32_t>(landed.rows);
    entry += isStatic ? tokens * static_cast<int32_t>(host_.asked.topK)
                      : static_cast<int32_t>(landed.entries);
  }
  const auto self = static_cast<size_t>(topology_.localRank());
  landRows = static_cast<size_t>(rows[self] + gap());
  landEntries = static_cast<size_t>(entries[self] + gap());
  receiveCapacity = static_cast<size_t>(
      host_.routes[rank_].numReceiveRows() + (gap() > 0 ? 5 : 0));
}

inline void RankPlan::placeSendRows() {
  const Route& route = host_.routes[rank_];
  const auto tokens = static_cast<int32_t>(route.numTokens());
  const auto topK = static_cast<int32_t>(route.topK());
  int32_t row = 0;
  int32_t slot = 0;
  for (int node = 0; node < route.numNodes(); ++node) {
    sendRowBegin.push_back(row);
    sendSlotBegin.push_back(slot);
    const size_t begin = route.sendBegin(node);
    const size_t end = route.sendBegin(node + 1);
    if (spread_ == Spread::kStatic) {
      row += tokens;
      slot += tokens * topK;
    } else {
      row += static_cast<int32_t>(end - begin) + gap();
      slot += static_cast<int32_t>(
                  route.sendSlotBegin(end) - route.sendSlotBegin(begin)) +
              gap();
    }
  }
  sendRowBegin.push_back(row);
  sendSlotBegin.push_back(slot);
}

/// CountPlan must not go by what only ListPlan knows.
inline Words RankPlan::sourceWords(bool withAreas) const {
  std::vector<PlanSource> all = sources;
  for (PlanSource& it : all) {
    it.landRow = withAreas ? it.landRow : -1000000;
    it.landEntry = withAreas ? it.landEntry : -1000000;
  }
  static_assert(sizeof(PlanSource) % sizeof(int32_t) == 0);
  Words words(all.size() * sizeof(PlanSource) / sizeof(int32_t));
  std::memcpy(words.data(), all.data(), all.size() * sizeof(PlanSource));
  return words;
}

inline std::vector<RankPlan::Output> RankPlan::outputsOf(
    const ListPlan& list) const {
  const Route& route = host_.routes[rank_];
  const auto tokens = static_cast<size_t>(route.numTokens());
  const size_t sent = route.numSendRows();
  const size_t slots = route.sendSlotBegin(sent);
  const size_t landed = route.numLandRows();
  const size_t experts = host_.results[rank_].offsets.size();
  return {
      {"sendTokens", &ListPlan::sendTokens, list.sendRows},
      {"sendSlots", &ListPlan::sendSlots, list.sendSlotPlaces},
      {"tokenBegins", &ListPlan::tokenBegins, tokens + 1},
      {"tokenTerms", &ListPlan::tokenTerms, sent},
      {"slotPlaces",
       &ListPlan::slotPlaces,
       tokens * static_cast<size_t>(route.topK())},
      {"receiveBases", &ListPlan::receiveBases, receiveCapacity},
      {"receiveRows", &ListPlan::receiveRows, receiveCapacity},
      {"receivePacked", &ListPlan::receivePacked, receiveCapacity},
      {"receiveEntries", &ListPlan::receiveEntries, receiveCapacity},
      {"receiveIndex", &ListPlan::receiveIndex, receiveCapacity},
      {"numTokensPerExpert", &ListPlan::numTokensPerExpert, experts},
      {"offsets", &ListPlan::offsets, experts},
      {"termBegins", &ListPlan::termBegins, landRows},
      {"termEnds", &ListPlan::termEnds, landRows},
      {"termBases", &ListPlan::termBases, landEntries},
      {"termRows", &ListPlan::termRows, landEntries},
      {"denseTokens", &ListPlan::denseTokens, sent},
      {"slotBegins", &ListPlan::slotBegins, sent + 1},
      {"denseSlots", &ListPlan::denseSlots, slots},
      {"entryBegins", &ListPlan::entryBegins, landed + 1},
      {"entries", &ListPlan::entries, route.entryBegin(landed)}};
}

}  // namespace automoe::plans
