// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_plan.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "process_group/common/error.hpp"
#include "process_group/exchange/route_experts.hpp"

namespace automoe {
namespace {

template <typename Item>
std::vector<int32_t> asWords(const std::vector<Item>& items) {
  static_assert(sizeof(Item) % sizeof(int32_t) == 0);
  const auto* first = reinterpret_cast<const int32_t*>(items.data());
  return {first, first + items.size() * (sizeof(Item) / sizeof(int32_t))};
}

const int32_t* wordsAt(const DeviceListPool::Block& block, size_t first = 0) {
  return reinterpret_cast<const int32_t*>(block.device) + first;
}

}  // namespace

void DevicePlan::describeSources() {
  idsRows_.assign(static_cast<size_t>(topology_.localSize()), 0);
  int64_t tokens = 0;
  for (int rank = 0; rank < topology_.size(); ++rank) {
    const int landing = topology_.nodeOf(rank) == topology_.node()
                            ? rank
                            : topology_.railPeerOf(rank, topology_.node());
    kernels::PlanSource source;
    source.node = topology_.nodeOf(rank);
    source.localRank = topology_.localRankOf(rank);
    source.tokenBegin = static_cast<int32_t>(tokens);
    source.landing = topology_.localRankOf(landing);
    size_t& rows = idsRows_[static_cast<size_t>(source.landing)];
    source.idsRow = static_cast<int32_t>(rows);
    const int64_t count = agreed_.facts[static_cast<size_t>(rank)].numTokens;
    rows += static_cast<size_t>(count);
    tokens += count;
    sources_.push_back(source);
  }
  kernels::PlanIds& of = count_.of;
  of.size = topology_.size();
  of.rank = topology_.rank();
  of.nodes = topology_.numNodes();
  of.node = topology_.node();
  of.mates = topology_.localSize();
  of.localRank = topology_.localRank();
  of.tokens = tokens;
  of.ownTokens = arguments_.numTokens;
  of.topK = arguments_.topK;
  of.experts = arguments_.numExperts;
  of.expertsPerRank = expertsPerRank(of.experts, of.size);
  of.align = arguments_.align;
  count_.maxReceiveRows = arguments_.maxReceiveTokens;
}

/// The ids of all ranks into the arenas of those who land them.
void DevicePlan::gather() const {
  std::vector<size_t> needs;
  for (const size_t rows : idsRows_) {
    needs.push_back(rows * rowBytes());
  }
  lane_.memory.begin(needs, lane_.timeout);
  if (lane_.fenced) {
    lane_.memory.fence(lane_.stream, DeviceMemory::Fence::kBegin);
  }
  const auto own = static_cast<size_t>(topology_.rank());
  const size_t bytes = ownTokens() * rowBytes();
  std::byte* arena = lane_.memory.arena(self_);
  const auto placeOf = [&](size_t source) {
    return arena + static_cast<size_t>(sources_[source].idsRow) * rowBytes();
  };
  if (bytes > 0) {
    lane_.device.copy(lane_.stream, placeOf(own), arguments_.topkIds, bytes);
  }
  if (lane_.network != nullptr) {
    std::vector<DeviceNetwork::Send> sends;
    std::vector<DeviceNetwork::Receive> receives;
    for (int hop = 1; hop < topology_.numNodes(); ++hop) {
      const int node = (topology_.node() + hop) % topology_.numNodes();
      sends.push_back({topology_.railPeer(node), arguments_.topkIds, bytes});
    }
    for (size_t source = 0; source < sources_.size(); ++source) {
      const kernels::PlanSource& it = sources_[source];
      if (it.node != topology_.node() && it.landing == topology_.localRank()) {
        const auto rows = static_cast<size_t>(agreed_.facts[source].numTokens);
        receives.push_back(
            {static_cast<int>(source), placeOf(source), rows * rowBytes()});
      }
    }
    lane_.network->exchange(lane_.stream, sends, receives);
  }
  lane_.memory.setReady(lane_.stream);
  lane_.memory.awaitReady(lane_.stream);
}

void DevicePlan::count(DeviceBuffer& scratch) {
  const DeviceListPool::Block table = upload(asWords(sources_));
  blocks_.push_back(table);
  count_.of.sources =
      reinterpret_cast<const kernels::PlanSource*>(table.device);
  for (size_t local = 0; local < idsRows_.size(); ++local) {
    count_.of.ids.at[local] = lane_.memory.arena(local);
  }
  const kernels::PlanCounts at(count_.of);
  const size_t bytes = at.words * sizeof(int32_t);
  counts_ = isStatic() ? pool_.take(bytes) : pool_.takeWithTwin(bytes);
  blocks_.push_back(counts_);
  count_.counts = reinterpret_cast<int32_t*>(counts_.device);
  count_.scratch = scratch.atLeast(kernels::scratchBytes(count_));
  run(count_);
  if (lane_.fenced) {
    lane_.memory.fence(lane_.stream, DeviceMemory::Fence::kEnd);
  }
}

void DevicePlan::readCounts(const HostWait& wait) {
  lane_.device.copy(
      lane_.stream,
      counts_.host,
      counts_.device,
      kernels::PlanCounts(count_.of).words * sizeof(int32_t));
  wait();
}

void DevicePlan::checkIds() const {
  const kernels::PlanCounts at(count_.of);
  for (size_t rank = 0; rank < sources_.size(); ++rank) {
    const size_t wrong = counted(at.invalidIds + rank);
    if (wrong > 0) {
      throw InvalidArgument(concat(
          "plan: rank ",
          rank,
          " has ",
          wrong,
          " topk_ids that are not in [-1, ",
          arguments_.numExperts,
          "), expected experts, of which there are num_experts, or -1"));
    }
  }
}

/// What the host knows of the lists: exactly, or in the static mode at most.
void DevicePlan::layOutRows(RouteLists& lists) const {
  const kernels::PlanCounts at(count_.of);
  for (size_t node = 0; node <= nodes_; ++node) {
    const size_t most = node * ownTokens();
    lists.sendRowBegin.push_back(
        isStatic() ? most : counted(at.sendBegin + node));
    lists.sendSlotBegin.push_back(
        isStatic() ? most * topK() : counted(at.sendSlotBegin + node));
  }
  for (size_t local = 0; local < idsRows_.size(); ++local) {
    lists.areas.emplace_back().stageRows =
        isStatic() ? static_cast<size_t>(arguments_.maxReceiveTokens)
                   : counted(at.receiveRows + local);
  }
  for (size_t source = 0; source < sources_.size(); ++source) {
    RouteLists::Landed it;
    it.landing = sources_[source].landing;
    RouteLists::Area& area = lists.areas[static_cast<size_t>(it.landing)];
    it.rowBegin = area.landRows;
    it.entryBegin = area.landEntries;
    if (isStatic()) {
      it.rows = static_cast<size_t>(agreed_.facts[source].numTokens);
      it.entries = it.rows * topK();
    } else {
      it.rows =
          counted(at.landBegin + source + 1) - counted(at.landBegin + source);
      it.entries =
          counted(at.entryBegin + source + 1) - counted(at.entryBegin + source);
    }
    area.landRows += it.rows;
    area.landEntries += it.entries;
    lists.landed.push_back(it);
  }
}

void DevicePlan::layOutLists(RouteLists& lists) {
  const RouteLists::Area& area = lists.areas[self_];
  const size_t sends = lists.sendRowBegin.back();
  lists.sendTokens = take(sends);
  lists.sendSlots = take(lists.sendSlotBegin.back());
  lists.tokenBegins = take(ownTokens() + 1);
  lists.tokenTerms = take(sends);
  lists.slotPlaces = take(ownTokens() * topK());
  lists.receiveBases = take(area.stageRows);
  lists.receiveRows = take(area.stageRows);
  lists.receivePacked = take(area.stageRows);
  lists.receiveEntries = take(area.stageRows);
  lists.termBegins = take(area.landRows);
  lists.termEnds = take(area.landRows);
  lists.termBases = take(area.landEntries);
  lists.termRows = take(area.landEntries);
}

/// What a route's words have and the lists have not.
void DevicePlan::layOutWords(const RouteLists& lists) {
  size_t rows = 0;
  size_t entries = 0;
  for (const RouteLists::Landed& it : lists.landed) {
    rows += it.rows;
    entries += it.entries;
  }
  planned_.tokens =
      isStatic() ? take(lists.sendTokens.count) : lists.sendTokens;
  planned_.slots = isStatic() ? take(lists.slotPlaces.count) : lists.sendSlots;
  planned_.slotBegins = take(lists.sendTokens.count + 1);
  planned_.entryBegins = take(rows + 1);
  planned_.entries = take(entries);
}

/// Where rows begin: in the areas, and among the own ones that are sent.
void DevicePlan::uploadPlaces(
    const RouteLists& lists, kernels::ListPlan& call) {
  for (size_t source = 0; source < sources_.size(); ++source) {
    sources_[source].landRow =
        static_cast<int32_t>(lists.landed[source].rowBegin);
    sources_[source].landEntry =
        static_cast<int32_t>(lists.landed[source].entryBegin);
  }
  std::vector<int32_t> words = asWords(sources_);
  const size_t rows = words.size();
  const auto append = [&](const std::vector<size_t>& begins) {
    std::ranges::transform(begins, std::back_inserter(words), [](size_t begin) {
      return static_cast<int32_t>(begin);
    });
  };
  append(lists.sendRowBegin);
  const size_t slots = words.size();
  append(lists.sendSlotBegin);
  const DeviceListPool::Block block = upload(words);
  blocks_.push_back(block);
  call.counted.of.sources =
      reinterpret_cast<const kernels::PlanSource*>(block.device);
  call.sendRowBegin = wordsAt(block, rows);
  call.sendSlotBegin = wordsAt(block, slots);
}

void DevicePlan::point(const RouteLists& lists, kernels::ListPlan& call) const {
  const auto at = [&](const RouteLists::List& list) {
    return reinterpret_cast<int32_t*>(block_.device) + list.begin;
  };
  call.sendRows = lists.sendTokens.count;
  call.sendSlotPlaces = lists.sendSlots.count;
  call.sendTokens = at(lists.sendTokens);
  call.sendSlots = at(lists.sendSlots);
  call.tokenBegins = at(lists.tokenBegins);
  call.tokenTerms = at(lists.tokenTerms);
  call.slotPlaces = at(lists.slotPlaces);
  call.receiveCapacity = lists.receiveBases.count;
  call.receiveBases = at(lists.receiveBases);
  call.receiveRows = at(lists.receiveRows);
  call.receivePacked = at(lists.receivePacked);
  call.receiveEntries = at(lists.receiveEntries);
  call.landRows = lists.termBegins.count;
  call.landEntries = lists.termBases.count;
  call.termBegins = at(lists.termBegins);
  call.termEnds = at(lists.termEnds);
  call.termBases = at(lists.termBases);
  call.termRows = at(lists.termRows);
  if (isStatic()) {
    call.denseTokens = at(planned_.tokens);
    call.denseSlots = at(planned_.slots);
  }
  call.slotBegins = at(planned_.slotBegins);
  call.entryBegins = at(planned_.entryBegins);
  call.entries = at(planned_.entries);
}

/// In the static mode the host does not know the ids.
uint64_t DevicePlan::fingerprint() const {
  const kernels::PlanCounts at(count_.of);
  std::vector<PlanFacts> facts = agreed_.facts;
  for (size_t rank = 0; rank < facts.size() && !isStatic(); ++rank) {
    std::memcpy(
        &facts[rank].idsHash,
        counts_.host + (at.idsHash + 2 * rank) * sizeof(int32_t),
        sizeof(uint64_t));
  }
  return fingerprintOf(facts);
}

RouteHeader DevicePlan::header(const RouteLists& lists) const {
  RouteHeader header;
  header.rank = topology_.rank();
  header.size = topology_.size();
  header.numNodes = topology_.numNodes();
  header.numTokens = arguments_.numTokens;
  header.totalTokens = count_.of.tokens;
  header.topK = arguments_.topK;
  header.numExperts = arguments_.numExperts;
  header.align = arguments_.align;
  header.numReceiveRows = static_cast<int64_t>(lists.numReceiveRows());
  header.fingerprint = lists.fingerprint;
  header.numSendRows = static_cast<int64_t>(lists.numSendRows());
  for (const RouteLists::Landed& it : lists.landed) {
    header.numLandRows += static_cast<int64_t>(it.rows);
  }
  header.numDropped =
      isStatic() ? -1 : static_cast<int64_t>(counted(planned_.at.dropped));
  return header;
}

void DevicePlan::list(DeviceRoute& route) {
  RouteLists lists;
  lists.rank = topology_.rank();
  lists.fingerprint = fingerprint();
  lists.numTokens = ownTokens();
  lists.own = topology_.localSize();
  layOutRows(lists);
  layOutLists(lists);
  layOutWords(lists);
  block_ = pool_.take(words_ * sizeof(int32_t));
  blocks_.push_back(block_);
  kernels::ListPlan call;
  call.counted = count_;
  uploadPlaces(lists, call);
  point(lists, call);
  const DevicePlanArguments::Outputs outputs =
      arguments_.allocate(lists.numReceiveRows());
  call.receiveIndex = outputs.receiveIndex;
  call.numTokensPerExpert = outputs.numTokensPerExpert;
  call.offsets = outputs.offsets;
  run(call);
  planned_.at = kernels::PlanCounts(count_.of);
  planned_.header = header(lists);
  planned_.counts = counts_;
  std::erase_if(blocks_, [&](const DeviceListPool::Block& block) {
    return block.device == counts_.device || block.device == block_.device;
  });
  route.fill(
      std::move(lists),
      block_,
      std::move(planned_),
      std::exchange(blocks_, {}));
}

}  // namespace automoe
