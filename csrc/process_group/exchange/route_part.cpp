// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/route.hpp"
#include "process_group/exchange/route_experts.hpp"
#include "process_group/exchange/route_hash.hpp"
#include "process_group/exchange/route_receive.hpp"

namespace automoe {
namespace {

struct Rows {
  size_t begin = 0;
  size_t end = 0;
  size_t size() const { return end - begin; }
};

/// Cuts lists of rows. Both sides of a list cut it alike: all that counts is
/// whether it stays on its node, and its length.
class Cut {
 public:
  Cut(int part, int numParts)
      : part_(static_cast<size_t>(part)),
        numParts_(static_cast<size_t>(numParts)) {}

  Rows of(Rows list, bool sameNode) const {
    if (numParts_ == 1) {
      return list;
    }
    if (sameNode) {
      return part_ == 0 ? list : Rows{list.begin, list.begin};
    }
    if (part_ == 0) {
      return {list.begin, list.begin};
    }
    const size_t pieces = numParts_ - 1;
    return {
        list.begin + list.size() * (part_ - 1) / pieces,
        list.begin + list.size() * part_ / pieces};
  }

 private:
  size_t part_;
  size_t numParts_;
};

void checkArguments(
    const Route& route,
    std::span<const int32_t> offsets,
    int part,
    int numParts) {
  if (numParts < 1 || part < 0 || part >= numParts) {
    throw InvalidArgument(concat(
        "plan_part: part is ",
        part,
        " of num_parts ",
        numParts,
        ", expected 0 <= part < num_parts"));
  }
  const int64_t numExperts =
      numExpertsOf(route.rank(), route.numExperts(), route.size());
  if (static_cast<int64_t>(offsets.size()) != numExperts) {
    throw InvalidArgument(concat(
        "plan_part: offsets has ",
        offsets.size(),
        " items, expected one for each of the ",
        numExperts,
        " experts of rank ",
        route.rank()));
  }
  int32_t before = 0;
  for (const int32_t end : offsets) {
    if (end < before || end > route.numReceiveRows()) {
      throw InvalidArgument(concat(
          "plan_part: offsets has ",
          end,
          " after ",
          before,
          ", expected ascending ends of at most ",
          route.numReceiveRows(),
          " receive rows"));
    }
    before = end;
  }
}

/// The local expert of each receive row; -1 behind the last expert's.
std::vector<int32_t> expertOfRows(
    const Route& route, std::span<const int32_t> offsets) {
  std::vector<int32_t> expertOf(
      static_cast<size_t>(route.numReceiveRows()), -1);
  auto at = expertOf.begin();
  for (size_t expert = 0; expert < offsets.size(); ++expert) {
    const auto end = expertOf.begin() + offsets[expert];
    std::fill(at, end, static_cast<int32_t>(expert));
    at = end;
  }
  return expertOf;
}

struct Selection {
  std::vector<Rows> send;  // by node
  std::vector<Rows> land;  // by source
};

Selection selectRows(const Route& route, const Cut& cut) {
  Selection selection;
  for (int node = 0; node < route.numNodes(); ++node) {
    selection.send.push_back(cut.of(
        {route.sendBegin(node), route.sendBegin(node + 1)},
        node == route.node()));
  }
  const auto nodes = route.nodeOfRank();
  for (int source = 0; source < route.size(); ++source) {
    selection.land.push_back(cut.of(
        {route.landBegin(source), route.landBegin(source + 1)},
        nodes[static_cast<size_t>(source)] == route.node()));
  }
  return selection;
}

RouteHeader makeHeader(
    const Route& route, const Selection& rows, uint64_t fingerprint) {
  RouteHeader header;
  header.rank = route.rank();
  header.size = route.size();
  header.numNodes = route.numNodes();
  header.numTokens = route.numTokens();
  header.totalTokens = route.totalTokens();
  header.topK = route.topK();
  header.numExperts = route.numExperts();
  header.align = route.align();
  header.fingerprint = fingerprint;
  for (const Rows& it : rows.send) {
    header.numSendRows += static_cast<int64_t>(it.size());
    header.numSlots += static_cast<int64_t>(
        route.sendSlotBegin(it.end) - route.sendSlotBegin(it.begin));
  }
  for (const Rows& it : rows.land) {
    header.numLandRows += static_cast<int64_t>(it.size());
    header.numEntries += static_cast<int64_t>(
        route.entryBegin(it.end) - route.entryBegin(it.begin));
  }
  return header;
}

void copySendRows(
    const Route& route,
    std::span<const Rows> lists,
    const RouteSections<int32_t>& sections) {
  size_t row = 0;
  size_t slot = 0;
  sections.slotBegin[0] = 0;
  for (size_t node = 0; node < lists.size(); ++node) {
    sections.sendBegin[node] = static_cast<int32_t>(row);
    for (size_t from = lists[node].begin; from < lists[node].end; ++from) {
      const auto slots = route.sendSlots(from);
      std::ranges::copy(slots, sections.slots.data() + slot);
      slot += slots.size();
      sections.sendTokens[row] = route.sendToken(from);
      sections.slotBegin[++row] = static_cast<int32_t>(slot);
    }
  }
  sections.sendBegin[lists.size()] = static_cast<int32_t>(row);
}

/// Receive rows of the whole become local experts again.
void copyLandRows(
    const Route& route,
    std::span<const Rows> lists,
    std::span<const int32_t> expertOf,
    const RouteSections<int32_t>& sections) {
  size_t row = 0;
  size_t next = 0;
  sections.entryBegin[0] = 0;
  for (size_t source = 0; source < lists.size(); ++source) {
    sections.landBegin[source] = static_cast<int32_t>(row);
    for (size_t from = lists[source].begin; from < lists[source].end; ++from) {
      for (const int32_t entry : route.entries(from)) {
        const int32_t expert =
            entry < 0 ? entry : expertOf[static_cast<size_t>(entry)];
        if (entry >= 0 && expert < 0) {
          throw InvalidArgument(concat(
              "plan_part: offsets ends before receive row ",
              entry,
              " of the route, expected the offsets of the same plan"));
        }
        sections.entries[next++] = expert;
      }
      sections.entryBegin[++row] = static_cast<int32_t>(next);
    }
  }
  sections.landBegin[lists.size()] = static_cast<int32_t>(row);
}

}  // namespace

PlanResult partOfRoute(
    const Route& route,
    std::span<const int32_t> offsets,
    int part,
    int numParts) {
  checkArguments(route, offsets, part, numParts);
  const Selection rows = selectRows(route, Cut(part, numParts));
  uint64_t fingerprint = route.fingerprint();
  fingerprint = mixHash(fingerprint, static_cast<uint64_t>(part));
  fingerprint = mixHash(fingerprint, static_cast<uint64_t>(numParts));
  RouteHeader header = makeHeader(route, rows, fingerprint);

  PlanResult result;
  result.route.resize(numRouteWords(header));
  const auto sections = sectionsOf(header, std::span(result.route));
  std::ranges::copy(route.nodeOfRank(), sections.nodeOfRank.begin());
  std::ranges::copy(route.reductionMap(), sections.reductionMap.begin());
  copySendRows(route, rows.send, sections);
  copyLandRows(route, rows.land, expertOfRows(route, offsets), sections);
  placeReceiveRows(sections.entries, offsets.size(), -1, header, result);
  writeRouteHeader(header, result.route);
  return result;
}

}  // namespace automoe
