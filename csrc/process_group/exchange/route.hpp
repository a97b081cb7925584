// SPDX-License-Identifier: Apache-2.0
// Where every row of a dispatch goes and every row of a combine comes from:
// what a plan is made of, as one array of 32-bit words.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "process_group/exchange/plan_list.hpp"
#include "process_group/exchange/route_send.hpp"
#include "process_group/exchange/route_words.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe {

/// A checked view of the words of a route; they must outlive it.
///
/// Seen from the origin, a *send row* is one (token, node): the token has at
/// least one expert on that node, so its row crosses to it once. Send rows are
/// sorted by (node, token). The *slots* of a send row are the flat indices
/// token * K + k of its experts there, sorted by (expert, k).
///
/// Seen from the expert's node, a *land row* is one (source rank, send row of
/// that source to this node), sorted by (source, row). Its *entries* are its
/// experts here, in the order of the slots. An entry that is this rank's holds
/// the position of the row in this rank's output (the *receive row*), or
/// kDropped; one of a node-mate holds ~localRank of that mate.
///
/// Receive rows are sorted by (local expert, source rank, source token, k);
/// each expert's rows begin at a multiple of `align`.
class Route {
 public:
  static constexpr int32_t kDropped = INT32_MIN;

  /// Throws InvalidArgument when the words are not those of a route. What is
  /// then read from it stays inside of the sizes it tells, whatever the words:
  /// tokens in [0, T), slots in [0, T * K), receive rows in [0, R). O(words).
  explicit Route(std::span<const int32_t> words);

  int rank() const { return header_.rank; }
  int size() const { return header_.size; }
  int numNodes() const { return header_.numNodes; }
  int node() const { return nodeOfRank()[at(header_.rank)]; }
  int64_t numTokens() const { return header_.numTokens; }      // T of this rank
  int64_t totalTokens() const { return header_.totalTokens; }  // of all ranks
  int64_t topK() const { return header_.topK; }
  int64_t numExperts() const { return header_.numExperts; }
  int64_t align() const { return header_.align; }
  /// R, padding included.
  int64_t numReceiveRows() const { return header_.numReceiveRows; }
  /// Entries of this rank that found no room.
  int64_t numDropped() const { return header_.numDropped; }
  /// Equal on all ranks; a hash of what every rank has planned.
  uint64_t fingerprint() const { return header_.fingerprint; }
  std::span<const int32_t> nodeOfRank() const { return sections_.nodeOfRank; }
  /// Node of each rank for the order of sums: the topology unless pinned.
  std::span<const int32_t> reductionMap() const {
    return sections_.reductionMap;
  }
  /// True when that order lets a node send one sum per token.
  bool sumsPerNode() const { return sumsPerNode_; }

  // The origin's side.
  size_t numSendRows() const { return sections_.sendTokens.size(); }
  size_t sendBegin(int node) const;  // node in [0, numNodes()]
  int32_t sendToken(size_t sendRow) const {
    return sections_.sendTokens[sendRow];
  }
  std::span<const int32_t> sendSlots(size_t sendRow) const {
    const size_t begin = sendSlotBegin(sendRow);
    return sections_.slots.subspan(begin, sendSlotBegin(sendRow + 1) - begin);
  }
  /// Where the slots of the send row begin among all; sendRow may be the end.
  size_t sendSlotBegin(size_t sendRow) const {
    return at(sections_.slotBegin[sendRow]);
  }

  // The expert's side.
  size_t numLandRows() const { return sections_.entryBegin.size() - 1; }
  size_t landBegin(int source) const;  // source in [0, size()]
  std::span<const int32_t> entries(size_t landRow) const {
    const size_t begin = entryBegin(landRow);
    return sections_.entries.subspan(begin, entryBegin(landRow + 1) - begin);
  }
  /// landRow may be the end.
  size_t entryBegin(size_t landRow) const {
    return at(sections_.entryBegin[landRow]);
  }

 private:
  static size_t at(int32_t index) { return static_cast<size_t>(index); }

  void checkHeader(size_t numWords) const;
  void checkRanks() const;
  void checkSend() const;
  void checkLand() const;
  void checkOwnRows() const;

  RouteHeader header_;
  RouteSections<const int32_t> sections_;
  bool sumsPerNode_ = false;
};

/// What a rank asks of a plan.
struct PlanArguments {
  std::span<const int32_t> topkIds;  // (T, K), -1 = no expert
  int64_t numTokens = 0;
  int64_t topK = 0;
  int64_t numExperts = 0;
  int64_t align = 1;
  int64_t maxReceiveTokens = -1;           // -1: as many as come
  std::vector<int32_t> reductionMap = {};  // empty: the topology
};

struct PlanResult {
  std::vector<int32_t> route;  // the words
  /// (R,) the entry that each receive row comes from, -1 for padding. R is
  /// maxReceiveTokens where that was given.
  std::vector<int32_t> receiveIndex;
  /// (e,) receive rows of each local expert without padding: those that found
  /// room where maxReceiveTokens was given.
  std::vector<int32_t> numTokensPerExpert;
  /// (e,) where the receive rows of each local expert end, padding included.
  std::vector<int32_t> offsets;
};

/// Makes a route from the own ids and the lists of all ranks. Pure: whoever
/// owns it carries the lists. Not thread-safe. Expert e is on rank e / ceil(E /
/// P), as DTensor's Shard(0) places it.
class RouteBuilder {
 public:
  /// Throws InvalidArgument naming the argument, what was got and expected.
  RouteBuilder(const Topology& topology, const PlanArguments& arguments);

  const PlanFacts& facts() const;
  /// What every rank of `node` has to know of this rank (facts first).
  std::string listFor(int node) const;
  /// The list of `source` for this node, the own one included; each once.
  /// Throws InvalidArgument naming both ranks and both values when the facts
  /// do not agree, TransportError when the bytes make no sense.
  void add(int source, std::span<const std::byte> list);
  /// Once, after the lists of all ranks. Throws InvalidArgument naming the
  /// sizes when they do not fit 32 bits.
  PlanResult finish();

 private:
  int64_t numExpertsOnNode(int node) const;
  std::vector<int32_t> targetOfExperts() const;
  RouteHeader makeHeader() const;
  void fillSections(const RouteSections<int32_t>& sections) const;

  Topology topology_;
  int64_t align_;
  int64_t maxReceiveTokens_;
  std::vector<int32_t> nodeOfRank_;
  std::vector<int32_t> reductionMap_;
  PlanFacts facts_;
  SendRows send_;
  std::vector<std::optional<PlanFacts>> factsOf_;  // by source
  std::vector<PlanList> lists_;                    // by source
  bool finished_ = false;
};

/// Part `part` of a plan whose rows are worked on in parts: part 0 has the
/// rows between ranks of one node, part i > 0 the i-th piece of numParts - 1
/// of the rows from each rank to each other node; with numParts 1, part 0 has
/// all rows. Needs no communication; same T, same fingerprint combined with
/// (part, numParts). Receive rows are sorted and aligned as in the whole. What
/// the whole has dropped stays dropped and is not counted again.
///
/// `offsets` are those of the whole. Throws InvalidArgument naming part,
/// numParts or offsets.
PlanResult partOfRoute(
    const Route& route,
    std::span<const int32_t> offsets,
    int part,
    int numParts);

}  // namespace automoe
