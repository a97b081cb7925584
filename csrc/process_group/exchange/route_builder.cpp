// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <iomanip>
#include <utility>

#include "kernels/ids_hash.hpp"
#include "process_group/common/error.hpp"
#include "process_group/exchange/plan_arguments.hpp"
#include "process_group/exchange/route.hpp"
#include "process_group/exchange/route_experts.hpp"
#include "process_group/exchange/route_receive.hpp"

namespace automoe {
namespace {

std::vector<int32_t> nodesOf(const Topology& topology) {
  std::vector<int32_t> nodeOfRank;
  for (int rank = 0; rank < topology.size(); ++rank) {
    nodeOfRank.push_back(topology.nodeOf(rank));
  }
  return nodeOfRank;
}

template <typename Value>
void checkSame(
    const char* name, std::pair<int, Value> one, std::pair<int, Value> other) {
  if (one.second == other.second) {
    return;
  }
  if (other.first < one.first) {
    std::swap(one, other);
  }
  throw InvalidArgument(concat(
      "plan: rank ",
      one.first,
      " has ",
      name,
      " ",
      one.second,
      ", rank ",
      other.first,
      " has ",
      other.second,
      "; all ranks of a plan must pass the same"));
}

std::string describeMap(uint64_t hash) {
  if (hash == 0) {
    return "of the topology";
  }
  return concat("with hash ", std::hex, std::setfill('0'), std::setw(16), hash);
}

void checkAgreement(
    int rank, const PlanFacts& ours, int source, const PlanFacts& theirs) {
  using Number = std::pair<int, int64_t>;
  using Text = std::pair<int, std::string>;
  checkSame(
      "num_experts",
      Number(rank, ours.numExperts),
      Number(source, theirs.numExperts));
  checkSame("topk", Number(rank, ours.topK), Number(source, theirs.topK));
  if (ours.mapHash != theirs.mapHash) {
    checkSame(
        "reduction_map",
        Text(rank, describeMap(ours.mapHash)),
        Text(source, describeMap(theirs.mapHash)));
  }
}

}  // namespace

RouteBuilder::RouteBuilder(
    const Topology& topology, const PlanArguments& arguments)
    : topology_(topology),
      align_(arguments.align),
      maxReceiveTokens_(arguments.maxReceiveTokens),
      nodeOfRank_(nodesOf(topology)),
      reductionMap_(canonicalReductionMap(arguments.reductionMap, nodeOfRank_)),
      factsOf_(nodeOfRank_.size()),
      lists_(nodeOfRank_.size()) {
  checkPlanArguments(arguments);
  facts_.numExperts = arguments.numExperts;
  facts_.topK = arguments.topK;
  facts_.numTokens = arguments.numTokens;
  facts_.mapHash = hashReductionMap(reductionMap_, nodeOfRank_);
  for (size_t i = 0; i < arguments.topkIds.size(); ++i) {
    facts_.idsHash += kernels::hashOfId(i, arguments.topkIds[i]);
  }
  send_ = makeSendRows(
      topology_, arguments.topkIds, facts_.topK, facts_.numExperts);
}

const PlanFacts& RouteBuilder::facts() const {
  return facts_;
}

int64_t RouteBuilder::numExpertsOnNode(int node) const {
  int64_t number = 0;
  for (const int rank : topology_.ranksOf(node)) {
    number += numExpertsOf(rank, facts_.numExperts, topology_.size());
  }
  return number;
}

std::string RouteBuilder::listFor(int node) const {
  const int64_t numExperts = numExpertsOnNode(node);
  const auto at = static_cast<size_t>(node);
  const auto begin = static_cast<size_t>(send_.begin[at]);
  const auto end = static_cast<size_t>(send_.begin[at + 1]);
  const auto firstSlot = static_cast<size_t>(send_.slotBegin[begin]);
  const auto endSlot = static_cast<size_t>(send_.slotBegin[end]);
  return encodePlanList(
      facts_,
      std::span(send_.slotBegin).subspan(begin, end - begin + 1),
      std::span(send_.nodeExperts).subspan(firstSlot, endSlot - firstSlot),
      numExperts);
}

void RouteBuilder::add(int source, std::span<const std::byte> list) {
  if (source < 0 || source >= topology_.size()) {
    throw TransportError(concat(
        "the plan of rank ", source, " in a group of ", topology_.size()));
  }
  const auto at = static_cast<size_t>(source);
  if (factsOf_[at].has_value()) {
    throw TransportError(concat("the plan of rank ", source, " came twice"));
  }
  const PlanFacts theirs = readPlanFacts(source, list);
  checkAgreement(topology_.rank(), facts_, source, theirs);
  if (source == topology_.rank()) {
    const std::string own = listFor(topology_.node());
    if (!std::ranges::equal(std::as_bytes(std::span(own)), list)) {
      throw TransportError(concat(
          "the plan of rank ", source, " (this rank) is not what it made"));
    }
  }
  lists_[at] =
      decodePlanList(source, theirs, list, numExpertsOnNode(topology_.node()));
  factsOf_[at] = theirs;
}

/// By expert of this node: the local expert of this rank, or ~localRank.
std::vector<int32_t> RouteBuilder::targetOfExperts() const {
  std::vector<int32_t> targets;
  const auto ranks = topology_.ranksOf(topology_.node());
  for (size_t local = 0; local < ranks.size(); ++local) {
    const int64_t number =
        numExpertsOf(ranks[local], facts_.numExperts, topology_.size());
    for (int64_t expert = 0; expert < number; ++expert) {
      targets.push_back(
          static_cast<int>(local) == topology_.localRank()
              ? static_cast<int32_t>(expert)
              : ~static_cast<int32_t>(local));
    }
  }
  return targets;
}

RouteHeader RouteBuilder::makeHeader() const {
  RouteHeader header;
  header.rank = topology_.rank();
  header.size = topology_.size();
  header.numNodes = topology_.numNodes();
  header.numTokens = facts_.numTokens;
  header.topK = facts_.topK;
  header.numExperts = facts_.numExperts;
  header.align = align_;
  header.numSendRows = static_cast<int64_t>(send_.tokens.size());
  header.numSlots = static_cast<int64_t>(send_.slots.size());
  std::vector<PlanFacts> facts;
  for (size_t source = 0; source < lists_.size(); ++source) {
    AUTOMOE_CHECK(
        factsOf_[source].has_value(),
        "the plan of rank ",
        source,
        " has not come");
    header.totalTokens += factsOf_[source]->numTokens;
    facts.push_back(*factsOf_[source]);
    header.numLandRows += static_cast<int64_t>(lists_[source].counts.size());
    header.numEntries += static_cast<int64_t>(lists_[source].experts.size());
  }
  header.fingerprint = fingerprintOf(facts);
  if (header.numEntries > kMaxRouteLength) {
    throw InvalidArgument(concat(
        "plan: ",
        header.totalTokens,
        " tokens with ",
        header.topK,
        " experts each have ",
        header.numEntries,
        " rows for the experts of node ",
        topology_.node(),
        ", expected at most ",
        kMaxRouteLength));
  }
  return header;
}

void RouteBuilder::fillSections(const RouteSections<int32_t>& sections) const {
  std::ranges::copy(nodeOfRank_, sections.nodeOfRank.begin());
  std::ranges::copy(reductionMap_, sections.reductionMap.begin());
  std::ranges::copy(send_.begin, sections.sendBegin.begin());
  std::ranges::copy(send_.tokens, sections.sendTokens.begin());
  std::ranges::copy(send_.slotBegin, sections.slotBegin.begin());
  std::ranges::copy(send_.slots, sections.slots.begin());
  const std::vector<int32_t> targets = targetOfExperts();
  size_t row = 0;
  size_t next = 0;
  int32_t end = 0;
  sections.entryBegin[0] = 0;
  for (size_t source = 0; source < lists_.size(); ++source) {
    sections.landBegin[source] = static_cast<int32_t>(row);
    for (const int32_t count : lists_[source].counts) {
      end += count;
      sections.entryBegin[++row] = end;
    }
    for (const int32_t expert : lists_[source].experts) {
      sections.entries[next++] = targets[static_cast<size_t>(expert)];
    }
  }
  sections.landBegin[lists_.size()] = static_cast<int32_t>(row);
}

PlanResult RouteBuilder::finish() {
  AUTOMOE_CHECK(!finished_, "a plan was finished twice");
  RouteHeader header = makeHeader();
  finished_ = true;
  PlanResult result;
  result.route.resize(numRouteWords(header));
  const auto sections = sectionsOf(header, std::span(result.route));
  fillSections(sections);
  lists_.clear();
  const int64_t numExperts =
      numExpertsOf(header.rank, facts_.numExperts, header.size);
  placeReceiveRows(
      sections.entries,
      static_cast<size_t>(numExperts),
      maxReceiveTokens_,
      header,
      result);
  writeRouteHeader(header, result.route);
  return result;
}

}  // namespace automoe
