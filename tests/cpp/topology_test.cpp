// SPDX-License-Identifier: Apache-2.0
// Topology on synthetic shapes: numbering, rails, subgroups, bad input.
#include "process_group/topology/topology.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

using Labels = std::vector<int64_t>;

// Labels of nodes of the given sizes, ranks placed node after node.
Labels blockLabels(const std::vector<int>& nodeSizes) {
  Labels labels;
  int64_t first = 0;
  for (const int size : nodeSizes) {
    labels.insert(labels.end(), static_cast<std::size_t>(size), first);
    first += size;
  }
  return labels;
}

// Rank r on node r mod numNodes.
Labels roundRobinLabels(int size, int numNodes) {
  Labels labels;
  for (int rank = 0; rank < size; ++rank) {
    labels.push_back(rank % numNodes);
  }
  return labels;
}

Labels shuffled(Labels labels, unsigned seed) {
  std::mt19937 random(seed);
  std::shuffle(labels.begin(), labels.end(), random);
  return labels;
}

std::vector<int> toVector(std::span<const int> ranks) {
  return {ranks.begin(), ranks.end()};
}

template <typename Call>
std::string invalidArgumentOf(Call call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "no InvalidArgument was thrown";
}

void expectContains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos)
      << "expected \"" << part << "\" in \"" << text << "\"";
}

TEST(TopologyTest, OneRank) {
  const Topology t = Topology::fromNodeLabels({7}, 0);
  EXPECT_EQ(t.size(), 1);
  EXPECT_EQ(t.numNodes(), 1);
  EXPECT_EQ(t.node(), 0);
  EXPECT_EQ(t.localRank(), 0);
  EXPECT_EQ(t.localSize(), 1);
  EXPECT_EQ(t.railPeer(0), 0);
  EXPECT_EQ(t.railSources(0), std::vector<int>{0});
  EXPECT_TRUE(t.uniform());
  EXPECT_EQ(t.describe(), "1 rank on 1 node");
}

TEST(TopologyTest, OneNodeOfEight) {
  const Topology t = Topology::fromNodeLabels(blockLabels({8}), 5);
  EXPECT_EQ(t.numNodes(), 1);
  EXPECT_EQ(t.localRank(), 5);
  EXPECT_EQ(t.localSize(), 8);
  EXPECT_EQ(t.railPeer(0), 5);
  EXPECT_EQ(t.describe(), "8 ranks on 1 node");
}

TEST(TopologyTest, EightNodesOfOne) {
  const Topology t =
      Topology::fromNodeLabels(blockLabels({1, 1, 1, 1, 1, 1, 1, 1}), 3);
  EXPECT_EQ(t.numNodes(), 8);
  EXPECT_EQ(t.node(), 3);
  EXPECT_EQ(t.localRank(), 0);
  for (int node = 0; node < 8; ++node) {
    EXPECT_EQ(t.railPeer(node), node);
    EXPECT_EQ(t.railSources(node), std::vector<int>{node});
  }
  EXPECT_EQ(t.describe(), "8 ranks on 8 nodes (1 each)");
}

TEST(TopologyTest, FourNodesOfTwo) {
  const Topology t = Topology::fromNodeLabels(blockLabels({2, 2, 2, 2}), 5);
  EXPECT_EQ(t.rank(), 5);
  EXPECT_EQ(t.node(), 2);
  EXPECT_EQ(t.localRank(), 1);
  EXPECT_EQ(toVector(t.ranksOf(3)), (std::vector<int>{6, 7}));
  EXPECT_EQ(t.railPeer(0), 1);
  EXPECT_EQ(t.railPeerOf(4, 3), 6);
  EXPECT_EQ(t.railSources(1), std::vector<int>{3});
  EXPECT_TRUE(t.uniform());
  EXPECT_EQ(t.describe(), "8 ranks on 4 nodes (2 each)");
}

TEST(TopologyTest, UnevenNodesShareTheSmallOnesRanks) {
  const Labels labels = blockLabels({3, 3, 2});
  const Topology large = Topology::fromNodeLabels(labels, 2);
  EXPECT_EQ(large.railPeer(1), 5);
  EXPECT_EQ(large.railPeer(2), 6);  // local rank 2 mod 2 = 0
  EXPECT_TRUE(large.railSources(2).empty());
  const Topology small = Topology::fromNodeLabels(labels, 6);
  EXPECT_EQ(small.railSources(0), (std::vector<int>{0, 2}));
  EXPECT_EQ(small.railSources(1), (std::vector<int>{3, 5}));
  EXPECT_EQ(small.railSources(2), std::vector<int>{6});
  EXPECT_FALSE(small.uniform());
  EXPECT_EQ(small.describe(), "8 ranks on 3 nodes (3, 3, 2)");
}

TEST(TopologyTest, EqualTotalsAreNotUniform) {
  // As many ranks as 3 nodes of 2, and the first node has 2.
  EXPECT_FALSE(Topology::fromNodeLabels(blockLabels({2, 1, 3}), 0).uniform());
  EXPECT_FALSE(Topology::fromNodeLabels(blockLabels({2, 2, 1}), 0).uniform());
}

TEST(TopologyTest, RoundRobinPlacement) {
  const Topology t = Topology::fromNodeLabels(roundRobinLabels(8, 3), 7);
  EXPECT_EQ(t.numNodes(), 3);
  EXPECT_EQ(toVector(t.ranksOf(0)), (std::vector<int>{0, 3, 6}));
  EXPECT_EQ(toVector(t.ranksOf(1)), (std::vector<int>{1, 4, 7}));
  EXPECT_EQ(toVector(t.ranksOf(2)), (std::vector<int>{2, 5}));
  EXPECT_EQ(t.node(), 1);
  EXPECT_EQ(t.localRank(), 2);
  EXPECT_EQ(t.railPeer(2), 2);
  EXPECT_EQ(t.describe(), "8 ranks on 3 nodes (3, 3, 2)");
}

TEST(TopologyTest, NodesAreNumberedByFirstAppearance) {
  const Topology t = Topology::fromNodeLabels({9, -4, 9, 1LL << 62}, 3);
  EXPECT_EQ(t.nodeOf(0), 0);
  EXPECT_EQ(t.nodeOf(1), 1);
  EXPECT_EQ(t.nodeOf(2), 0);
  EXPECT_EQ(t.nodeOf(3), 2);
  EXPECT_EQ(t.localRankOf(2), 1);
}

TEST(TopologyTest, LabelsOnlyMatterByEquality) {
  EXPECT_EQ(
      Topology::fromNodeLabels({5, 5, 8, 5}, 1),
      Topology::fromNodeLabels({0, 0, -1, 0}, 1));
  EXPECT_NE(
      Topology::fromNodeLabels({5, 5, 8, 5}, 1),
      Topology::fromNodeLabels({5, 8, 8, 5}, 1));
}

TEST(TopologyTest, LongListsOfNodesAreCutShort) {
  std::vector<int> sizes(17, 2);
  sizes[3] = 1;
  EXPECT_EQ(
      Topology::fromNodeLabels(blockLabels(sizes), 0).describe(),
      "33 ranks on 17 nodes (2, 2, 2, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, "
      "...)");
}

// What must hold for every shape, whatever the placement.
class TopologyShapeTest : public testing::TestWithParam<Labels> {};

TEST_P(TopologyShapeTest, NodesPartitionTheRanks) {
  const Labels& labels = GetParam();
  const Topology t = Topology::fromNodeLabels(labels, 0);
  ASSERT_EQ(t.size(), static_cast<int>(labels.size()));
  int visited = 0;
  for (int node = 0; node < t.numNodes(); ++node) {
    const std::span<const int> ranks = t.ranksOf(node);
    ASSERT_FALSE(ranks.empty());
    EXPECT_TRUE(std::is_sorted(ranks.begin(), ranks.end()));
    for (std::size_t local = 0; local < ranks.size(); ++local) {
      const auto rank = static_cast<std::size_t>(ranks[local]);
      EXPECT_EQ(labels[rank], labels[static_cast<std::size_t>(ranks[0])]);
      EXPECT_EQ(t.nodeOf(ranks[local]), node);
      EXPECT_EQ(t.localRankOf(ranks[local]), static_cast<int>(local));
      ++visited;
    }
  }
  EXPECT_EQ(visited, t.size());
}

TEST_P(TopologyShapeTest, RailSourcesInvertRailPeers) {
  const Labels& labels = GetParam();
  const Topology t = Topology::fromNodeLabels(labels, 0);
  // For each pair of nodes, the lists of all receivers hold every rank of the
  // source node exactly once. Large groups: the nodes of a few ranks only.
  const int step = std::max(1, t.size() / 64);
  for (int rank = 0; rank < t.size(); rank += step) {
    const int target = t.nodeOf(rank);
    std::vector<int> timesSeen(labels.size(), 0);
    for (const int receiver : t.ranksOf(target)) {
      const Topology own = Topology::fromNodeLabels(labels, receiver);
      for (int source = 0; source < t.numNodes(); ++source) {
        for (const int sender : own.railSources(source)) {
          EXPECT_EQ(t.nodeOf(sender), source);
          EXPECT_EQ(t.railPeerOf(sender, target), receiver);
          ++timesSeen[static_cast<std::size_t>(sender)];
        }
      }
    }
    EXPECT_EQ(timesSeen, std::vector<int>(labels.size(), 1));
  }
}

TEST_P(TopologyShapeTest, RailsAreBalanced) {
  // No rank of a node serves two more senders of another node than a mate.
  const Labels& labels = GetParam();
  const Topology t = Topology::fromNodeLabels(labels, 0);
  const int numNodes = std::min(t.numNodes(), 8);
  for (int source = 0; source < numNodes; ++source) {
    for (int target = 0; target < numNodes; ++target) {
      std::vector<int> load(t.ranksOf(target).size(), 0);
      for (const int sender : t.ranksOf(source)) {
        const int receiver = t.railPeerOf(sender, target);
        ++load[static_cast<std::size_t>(t.localRankOf(receiver))];
      }
      const auto [low, high] = std::ranges::minmax(load);
      EXPECT_LE(high - low, 1);
    }
  }
}

TEST_P(TopologyShapeTest, PermutedSubgroupsKeepWhoSharesANode) {
  const Labels& labels = GetParam();
  const Topology t = Topology::fromNodeLabels(labels, 0);
  std::vector<int> members(labels.size());
  std::iota(members.begin(), members.end(), 0);
  std::mt19937 random(11);
  std::shuffle(members.begin(), members.end(), random);
  members.resize((members.size() + 1) / 2);
  const int last = static_cast<int>(members.size()) - 1;
  const Topology sub = t.subgroup(members, last);
  EXPECT_EQ(sub.rank(), last);
  ASSERT_EQ(sub.size(), static_cast<int>(members.size()));
  for (std::size_t i = 0; i < members.size(); ++i) {
    const std::size_t j = (i * 7 + 3) % members.size();
    EXPECT_EQ(
        sub.nodeOf(static_cast<int>(i)) == sub.nodeOf(static_cast<int>(j)),
        t.nodeOf(members[i]) == t.nodeOf(members[j]));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    TopologyShapeTest,
    testing::Values(
        blockLabels({1}),
        blockLabels({8}),
        blockLabels({1, 1, 1, 1, 1, 1, 1, 1}),
        blockLabels({2, 2, 2, 2}),
        blockLabels({3, 3, 2}),
        blockLabels({5, 1, 3}),
        roundRobinLabels(8, 4),
        roundRobinLabels(11, 4),
        shuffled(blockLabels({7, 2, 4, 1}), 1),
        blockLabels(std::vector<int>(512, 8)),
        shuffled(blockLabels(std::vector<int>(128, 8)), 2),
        roundRobinLabels(4096, 511)));

TEST(TopologyTest, SubgroupOrderDecidesRanksAndNodes) {
  const Topology t = Topology::fromNodeLabels(blockLabels({2, 2, 2, 2}), 0);
  const Topology sub = t.subgroup({7, 2, 6, 3, 0}, 1);
  EXPECT_EQ(sub.describe(), "5 ranks on 3 nodes (2, 2, 1)");
  EXPECT_EQ(sub.nodeOf(0), 0);
  EXPECT_EQ(toVector(sub.ranksOf(0)), (std::vector<int>{0, 2}));
  EXPECT_EQ(toVector(sub.ranksOf(1)), (std::vector<int>{1, 3}));
  EXPECT_EQ(toVector(sub.ranksOf(2)), std::vector<int>{4});
  EXPECT_EQ(sub.node(), 1);
  EXPECT_EQ(sub.railPeer(2), 4);
}

TEST(TopologyTest, SubgroupOfAllInOrderIsTheSame) {
  const Topology t = Topology::fromNodeLabels(roundRobinLabels(6, 4), 2);
  EXPECT_EQ(t.subgroup({0, 1, 2, 3, 4, 5}, 2), t);
}

TEST(TopologyTest, BadInputNamesGotAndExpected) {
  const Labels labels = blockLabels({2, 2});
  expectContains(
      invalidArgumentOf([] { Topology::fromNodeLabels({}, 0); }),
      "no node labels");
  expectContains(
      invalidArgumentOf([&] { Topology::fromNodeLabels(labels, 4); }),
      "got rank 4, expected 0 <= rank < 4");
  expectContains(
      invalidArgumentOf([&] { Topology::fromNodeLabels(labels, -1); }),
      "got rank -1");
  const Topology t = Topology::fromNodeLabels(labels, 0);
  expectContains(
      invalidArgumentOf([&] { t.ranksOf(2); }),
      "got node 2, expected 0 <= node < 2");
  expectContains(invalidArgumentOf([&] { t.railPeer(-1); }), "got node -1");
  expectContains(invalidArgumentOf([&] { t.railSources(2); }), "got node 2");
  expectContains(invalidArgumentOf([&] { t.railPeerOf(9, 0); }), "got rank 9");
  expectContains(invalidArgumentOf([&] { t.nodeOf(4); }), "got rank 4");
  expectContains(invalidArgumentOf([&] { t.localRankOf(-2); }), "got rank -2");
}

TEST(TopologyTest, BadSubgroups) {
  const Topology t = Topology::fromNodeLabels(blockLabels({2, 2}), 0);
  expectContains(
      invalidArgumentOf([&] { t.subgroup({0, 3, 0}, 0); }), "rank 0 twice");
  expectContains(
      invalidArgumentOf([&] { t.subgroup({0, 4}, 0); }), "got rank 4");
  expectContains(
      invalidArgumentOf([&] { t.subgroup({3, 1}, 2); }),
      "got rank 2, expected 0 <= rank < 2");
  expectContains(
      invalidArgumentOf([&] { t.subgroup({}, 0); }), "no node labels");
}

}  // namespace
}  // namespace automoe
