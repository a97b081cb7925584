// SPDX-License-Identifier: Apache-2.0
// Which ranks of a group share a node, and which ranks meet across nodes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace automoe {

/// Ranks, nodes, local ranks and rails of one group: an immutable value.
///
/// All ranks are group ranks, 0 <= rank < size(). A node is a set of ranks
/// that can map each other's memory; nodes are numbered 0.. in the order in
/// which their first rank appears. The local rank of a rank is its position
/// among the ranks of its node, ascending. A rail joins ranks across nodes:
/// the rank with local rank l meets local rank (l mod G) of a node of G ranks.
/// With equal nodes, rail l is simply local rank l of every node.
///
///     3 + 2 ranks     node 0: 0 1 2       rail peers of 0, 1, 2 on node 1:
///                     node 1: 3 4         3, 4, 3; of 3, 4 on node 0: 0, 1
///
/// Construction takes O(size()); queries take O(1) but where said otherwise.
/// Every rank or node out of range throws InvalidArgument. Safe to read from
/// several threads.
class Topology {
 public:
  /// Builds the topology that `rank` sees. labels[r] is any label of the node
  /// of rank r (equal label = same node), e.g. the smallest rank on it.
  static Topology fromNodeLabels(const std::vector<int64_t>& labels, int rank);

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(nodeOfRank_.size()); }
  int numNodes() const { return static_cast<int>(nodeBegin_.size()) - 1; }

  /// Node, local rank and number of ranks on the node, of this rank.
  int node() const;
  int localRank() const;
  int localSize() const;

  int nodeOf(int rank) const;
  int localRankOf(int rank) const;

  /// The ranks of `node`, ascending; the i-th has local rank i. Valid as long
  /// as this topology is neither assigned to nor destroyed.
  std::span<const int> ranksOf(int node) const;

  /// The rank of `node` that this rank's rail meets; this rank itself when
  /// `node` is its own.
  int railPeer(int node) const;
  /// The same for any rank.
  int railPeerOf(int rank, int node) const;

  /// The ranks of `node` whose rail peer on this rank's node is this rank,
  /// ascending. Several where `node` is larger than this rank's node, none for
  /// the last local ranks where it is smaller. O(length of the answer).
  std::vector<int> railSources(int node) const;

  /// True if every node has the same number of ranks.
  bool uniform() const;

  /// Topology of the group whose rank i is ranks[i] here, in any order, as
  /// seen by rank `rank` of that group. Nodes are numbered anew.
  Topology subgroup(const std::vector<int>& ranks, int rank) const;

  /// E.g. "8 ranks on 4 nodes (2 each)", "8 ranks on 3 nodes (3, 3, 2)".
  std::string describe() const;

  bool operator==(const Topology&) const = default;

 private:
  Topology() = default;

  std::size_t checkedRank(int rank) const;
  std::size_t checkedNode(int node) const;

  int rank_ = 0;
  std::vector<int> nodeOfRank_;
  std::vector<int> localRankOfRank_;
  // Ranks sorted by (node, rank); those of node n are at
  // [nodeBegin_[n], nodeBegin_[n + 1]).
  std::vector<int> ranksByNode_;
  std::vector<std::size_t> nodeBegin_;
};

}  // namespace automoe
