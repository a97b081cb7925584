// SPDX-License-Identifier: Apache-2.0
#include "process_group/topology/topology.hpp"

#include <algorithm>
#include <limits>
#include <unordered_map>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

// Lists of node sizes longer than this are summarised, so that a log line
// stays a line on a cluster of hundreds of uneven nodes.
constexpr int kMaxListedNodes = 16;

std::string count(int n, const char* noun) {
  return std::to_string(n) + " " + noun + (n == 1 ? "" : "s");
}

// Numbers labels 0.. by first appearance.
std::vector<int> numberNodes(const std::vector<int64_t>& labels) {
  std::unordered_map<int64_t, int> nodeOfLabel;
  nodeOfLabel.reserve(labels.size());
  std::vector<int> nodeOfRank;
  nodeOfRank.reserve(labels.size());
  for (const int64_t label : labels) {
    const int next = static_cast<int>(nodeOfLabel.size());
    nodeOfRank.push_back(nodeOfLabel.try_emplace(label, next).first->second);
  }
  return nodeOfRank;
}

}  // namespace

Topology Topology::fromNodeLabels(
    const std::vector<int64_t>& labels, int rank) {
  if (labels.empty()) {
    throw InvalidArgument(
        "Topology: got no node labels, expected one per rank of the group");
  }
  if (labels.size() > std::numeric_limits<int>::max()) {
    throw InvalidArgument(concat(
        "Topology: got ",
        labels.size(),
        " node labels, expected at most ",
        std::numeric_limits<int>::max()));
  }
  Topology topology;
  topology.nodeOfRank_ = numberNodes(labels);
  topology.rank_ = rank;
  topology.checkedRank(rank);

  const int numNodes = 1 + std::ranges::max(topology.nodeOfRank_);
  std::vector<std::size_t>& begin = topology.nodeBegin_;
  begin.assign(static_cast<std::size_t>(numNodes) + 1, 0);
  for (const int node : topology.nodeOfRank_) {
    ++begin[static_cast<std::size_t>(node) + 1];
  }
  for (std::size_t node = 1; node < begin.size(); ++node) {
    begin[node] += begin[node - 1];
  }

  // Ranks are visited in ascending order, so each node's list ascends.
  std::vector<std::size_t> next(begin.begin(), begin.end() - 1);
  topology.ranksByNode_.resize(labels.size());
  topology.localRankOfRank_.resize(labels.size());
  for (std::size_t r = 0; r < labels.size(); ++r) {
    const auto node = static_cast<std::size_t>(topology.nodeOfRank_[r]);
    topology.localRankOfRank_[r] = static_cast<int>(next[node] - begin[node]);
    topology.ranksByNode_[next[node]++] = static_cast<int>(r);
  }
  return topology;
}

int Topology::node() const {
  return nodeOf(rank_);
}

int Topology::localRank() const {
  return localRankOf(rank_);
}

int Topology::localSize() const {
  return static_cast<int>(ranksOf(node()).size());
}

int Topology::nodeOf(int rank) const {
  return nodeOfRank_[checkedRank(rank)];
}

int Topology::localRankOf(int rank) const {
  return localRankOfRank_[checkedRank(rank)];
}

std::span<const int> Topology::ranksOf(int node) const {
  const std::size_t n = checkedNode(node);
  return std::span<const int>(ranksByNode_)
      .subspan(nodeBegin_[n], nodeBegin_[n + 1] - nodeBegin_[n]);
}

int Topology::railPeer(int node) const {
  return railPeerOf(rank_, node);
}

int Topology::railPeerOf(int rank, int node) const {
  const std::span<const int> ranks = ranksOf(node);
  return ranks[static_cast<std::size_t>(localRankOf(rank)) % ranks.size()];
}

std::vector<int> Topology::railSources(int node) const {
  const std::span<const int> ranks = ranksOf(node);
  const auto step = static_cast<std::size_t>(localSize());
  std::vector<int> sources;
  for (auto local = static_cast<std::size_t>(localRank()); local < ranks.size();
       local += step) {
    sources.push_back(ranks[local]);
  }
  return sources;
}

bool Topology::uniform() const {
  const std::size_t first = nodeBegin_[1];
  for (std::size_t node = 2; node < nodeBegin_.size(); ++node) {
    if (nodeBegin_[node] != node * first) {
      return false;
    }
  }
  return true;
}

Topology Topology::subgroup(const std::vector<int>& ranks, int rank) const {
  std::vector<int64_t> labels;
  labels.reserve(ranks.size());
  std::vector<bool> seen(nodeOfRank_.size(), false);
  for (const int member : ranks) {
    const std::size_t r = checkedRank(member);
    if (seen[r]) {
      throw InvalidArgument(concat(
          "Topology::subgroup: got rank ",
          member,
          " twice, expected distinct ranks"));
    }
    seen[r] = true;
    labels.push_back(nodeOfRank_[r]);
  }
  return fromNodeLabels(labels, rank);
}

std::string Topology::describe() const {
  std::string text = count(size(), "rank") + " on " + count(numNodes(), "node");
  if (numNodes() == 1) {
    return text;
  }
  if (uniform()) {
    return text + " (" + std::to_string(localSize()) + " each)";
  }
  text += " (";
  for (int node = 0; node < std::min(numNodes(), kMaxListedNodes); ++node) {
    text += (node == 0 ? "" : ", ") + std::to_string(ranksOf(node).size());
  }
  return text + (numNodes() > kMaxListedNodes ? ", ...)" : ")");
}

std::size_t Topology::checkedRank(int rank) const {
  if (rank < 0 || rank >= size()) {
    throw InvalidArgument(
        concat("Topology: got rank ", rank, ", expected 0 <= rank < ", size()));
  }
  return static_cast<std::size_t>(rank);
}

std::size_t Topology::checkedNode(int node) const {
  if (node < 0 || node >= numNodes()) {
    throw InvalidArgument(concat(
        "Topology: got node ", node, ", expected 0 <= node < ", numNodes()));
  }
  return static_cast<std::size_t>(node);
}

}  // namespace automoe
