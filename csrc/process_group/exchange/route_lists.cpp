// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/route_lists.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <utility>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

bool isOwn(int32_t entry) {
  return entry >= 0 || entry == Route::kDropped;
}

int32_t narrow(size_t value) {
  if (value > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw InvalidArgument(concat(
        "plan: a node has ",
        value,
        " rows to exchange, expected at most ",
        std::numeric_limits<int32_t>::max(),
        "; plan fewer tokens at a time"));
  }
  return static_cast<int32_t>(value);
}

class ListMaker {
 public:
  ListMaker(const Route& route, const Topology& topology)
      : route_(route),
        topology_(topology),
        self_(static_cast<size_t>(topology.localRank())),
        mates_(static_cast<size_t>(topology.localSize())) {}

  RouteLists make() {
    lists_.rank = route_.rank();
    lists_.fingerprint = route_.fingerprint();
    lists_.numTokens = static_cast<size_t>(route_.numTokens());
    for (int node = 0; node <= route_.numNodes(); ++node) {
      const size_t row = route_.sendBegin(node);
      lists_.sendRowBegin.push_back(row);
      lists_.sendSlotBegin.push_back(route_.sendSlotBegin(row));
    }
    lists_.own = narrow(mates_);
    layOutAreas();
    makeSendLists();
    makeTokenLists();
    makeReceiveLists();
    return std::move(lists_);
  }

 private:
  /// Calls see(source, land row, entry's number among all, entry).
  template <typename See>
  void forEachEntry(const See& see) const {
    for (int source = 0; source < route_.size(); ++source) {
      const size_t end = route_.landBegin(source + 1);
      for (size_t row = route_.landBegin(source); row < end; ++row) {
        size_t number = route_.entryBegin(row);
        for (const int32_t entry : route_.entries(row)) {
          see(source, row, number++, entry);
        }
      }
    }
  }

  std::span<int32_t> add(RouteLists::List& list, size_t count, int32_t value) {
    list = {lists_.words.size(), count};
    lists_.words.resize(list.begin + count, value);
    return span(list);
  }
  std::span<int32_t> span(const RouteLists::List& list) {
    return std::span(lists_.words).subspan(list.begin, list.count);
  }
  RouteLists::Landed& landed(int source) {
    return lists_.landed[static_cast<size_t>(source)];
  }
  size_t landingOf(int source) {
    return static_cast<size_t>(landed(source).landing);
  }
  size_t ownerOf(int32_t entry) const {
    return isOwn(entry) ? self_ : static_cast<size_t>(~entry);
  }
  size_t& staged(size_t mate, size_t landing) {
    return staged_[mate * mates_ + landing];
  }

  void layOutAreas();
  void makeSendLists();
  void makeTokenLists();
  void makeReceiveLists();
  void receive(int source, size_t row, size_t number, size_t at);

  const Route& route_;
  const Topology& topology_;
  const size_t self_;
  const size_t mates_;
  RouteLists lists_;
  /// By (mate, landing): how many rows of the mate the other sums; then where
  /// the next of them is staged.
  std::vector<size_t> staged_;
};

void ListMaker::layOutAreas() {
  lists_.areas.resize(mates_);
  lists_.receivedFrom.assign(mates_, 0);
  for (int source = 0; source < route_.size(); ++source) {
    const int landing = topology_.nodeOf(source) == topology_.node()
                            ? source
                            : topology_.railPeerOf(source, topology_.node());
    RouteLists::Landed it;
    it.landing = topology_.localRankOf(landing);
    RouteLists::Area& area = lists_.areas[static_cast<size_t>(it.landing)];
    const size_t begin = route_.landBegin(source);
    const size_t end = route_.landBegin(source + 1);
    it.rowBegin = area.landRows;
    it.rows = end - begin;
    it.entryBegin = area.landEntries;
    it.entries = route_.entryBegin(end) - route_.entryBegin(begin);
    area.landRows += it.rows;
    area.landEntries += it.entries;
    lists_.landed.push_back(it);
  }
  staged_.assign(mates_ * mates_, 0);
  forEachEntry([&](int source, size_t, size_t, int32_t entry) {
    if (ownerOf(entry) != landingOf(source)) {
      staged(ownerOf(entry), landingOf(source)) += 1;
    }
  });
  for (size_t mate = 0; mate < mates_; ++mate) {
    size_t next = 0;
    for (size_t landing = 0; landing < mates_; ++landing) {
      next += std::exchange(staged(mate, landing), next);
    }
    lists_.areas[mate].stageRows = next;
  }
}

void ListMaker::makeSendLists() {
  const size_t rows = route_.numSendRows();
  const auto tokens = add(lists_.sendTokens, rows, 0);
  for (size_t row = 0; row < rows; ++row) {
    tokens[row] = route_.sendToken(row);
  }
  const auto slots = add(lists_.sendSlots, route_.sendSlotBegin(rows), 0);
  for (size_t row = 0; row < rows; ++row) {
    std::ranges::copy(
        route_.sendSlots(row),
        slots.begin() + static_cast<ptrdiff_t>(route_.sendSlotBegin(row)));
  }
}

void ListMaker::makeTokenLists() {
  const auto numTokens = static_cast<size_t>(route_.numTokens());
  const size_t rows = route_.numSendRows();
  const auto begins = add(lists_.tokenBegins, numTokens + 1, 0);
  for (size_t row = 0; row < rows; ++row) {
    begins[static_cast<size_t>(route_.sendToken(row)) + 1] += 1;
  }
  std::partial_sum(begins.begin(), begins.end(), begins.begin());
  std::vector<int32_t> next(begins.begin(), begins.end() - 1);
  const auto terms = add(lists_.tokenTerms, rows, 0);
  // Send rows are sorted by node first, so each token's come ascending.
  for (size_t row = 0; row < rows; ++row) {
    int32_t& at = next[static_cast<size_t>(route_.sendToken(row))];
    terms[static_cast<size_t>(at++)] = narrow(row);
  }
  const auto places = add(
      lists_.slotPlaces, numTokens * static_cast<size_t>(route_.topK()), -1);
  const auto slots = span(lists_.sendSlots);
  for (size_t i = 0; i < slots.size(); ++i) {
    places[static_cast<size_t>(slots[i])] = narrow(i);
  }
}

void ListMaker::makeReceiveLists() {
  const auto count = static_cast<size_t>(route_.numReceiveRows());
  const RouteLists::Area& area = lists_.areas[self_];
  add(lists_.receiveBases, count, 0);
  add(lists_.receiveRows, count, -1);
  add(lists_.receivePacked, count, -1);
  add(lists_.receiveEntries, count, -1);
  add(lists_.stageRows, area.stageRows, -1);
  add(lists_.termBegins, area.landRows + 1, 0);
  add(lists_.termBases, area.landEntries, 0);
  add(lists_.termRows, area.landEntries, -1);
  // No list is added from here on, so the spans stay.
  const auto stageRows = span(lists_.stageRows);
  const auto begins = span(lists_.termBegins);
  const auto bases = span(lists_.termBases);
  const auto terms = span(lists_.termRows);
  size_t term = 0;
  forEachEntry([&](int source, size_t row, size_t number, int32_t entry) {
    const bool own = isOwn(entry);
    const size_t owner = ownerOf(entry);
    const size_t landing = landingOf(source);
    const int32_t receiveRow = entry >= 0 ? entry : -1;
    if (receiveRow >= 0) {
      receive(source, row, number, static_cast<size_t>(receiveRow));
    }
    size_t place = 0;
    if (owner != landing) {
      place = staged(owner, landing)++;
      if (own) {
        stageRows[place] = receiveRow;
      }
    }
    if (landing == self_) {
      bases[term] = own ? lists_.own : narrow(owner);
      terms[term] = own ? receiveRow : narrow(place);
      term += 1;
      const size_t i = row - route_.landBegin(source);
      begins[landed(source).rowBegin + i + 1] = narrow(term);
    }
  });
  // Rows without entries, which no plan of ours has, end where they begin.
  std::partial_sum(
      begins.begin(), begins.end(), begins.begin(), [](auto a, auto b) {
        return std::max(a, b);
      });
}

void ListMaker::receive(int source, size_t row, size_t number, size_t at) {
  const size_t i = row - route_.landBegin(source);
  if (source == route_.rank()) {
    const size_t sendRow = route_.sendBegin(route_.node()) + i;
    const size_t j = number - route_.entryBegin(row);
    span(lists_.receiveBases)[at] = lists_.own;
    span(lists_.receiveRows)[at] = route_.sendToken(sendRow);
    span(lists_.receivePacked)[at] = narrow(sendRow);
    span(lists_.receiveEntries)[at] = route_.sendSlots(sendRow)[j];
    return;
  }
  const RouteLists::Landed& it = landed(source);
  lists_.receivedFrom[landingOf(source)] += 1;
  const size_t first = route_.entryBegin(route_.landBegin(source));
  span(lists_.receiveBases)[at] = it.landing;
  span(lists_.receiveRows)[at] = narrow(it.rowBegin + i);
  span(lists_.receivePacked)[at] = narrow(it.rowBegin + i);
  span(lists_.receiveEntries)[at] = narrow(it.entryBegin + number - first);
}

}  // namespace

RouteLists makeRouteLists(const Route& route, const Topology& topology) {
  return ListMaker(route, topology).make();
}

}  // namespace automoe
