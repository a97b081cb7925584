// SPDX-License-Identifier: Apache-2.0
// The choice between memory of the node and NCCL.
#include "process_group/exchange/peer_choice.hpp"

#include <gtest/gtest.h>

#include <algorithm>

namespace automoe::testing {
namespace {

constexpr uint64_t kKibi = 1 << 10;
constexpr uint64_t kMebi = 1 << 20;

TEST(PeerChoice, TheNearestMeasuredSizeDecides) {
  const PeerChoice choice(
      {{4 * kKibi, 30e-6, 12e-6},
       {64 * kKibi, 15e-6, 25e-6},
       {kMebi, 80e-6, 60e-6},
       {16 * kMebi, 500e-6, 900e-6}});
  EXPECT_FALSE(choice.peers(0));
  EXPECT_FALSE(choice.peers(15 * kKibi));
  EXPECT_TRUE(choice.peers(17 * kKibi));  // 16 KiB is in the middle
  EXPECT_TRUE(choice.peers(255 * kKibi));
  EXPECT_FALSE(choice.peers(257 * kKibi));
  EXPECT_FALSE(choice.peers(3 * kMebi));
  EXPECT_TRUE(choice.peers(5 * kMebi));
  EXPECT_TRUE(choice.peers(64 * kMebi));
  EXPECT_FALSE(choice.peers(64 * kMebi + 1));
  EXPECT_EQ(
      choice.text().substr(0, 53),
      "4 KiB: 30 us through memory of the node, 12 us by NCC");
  EXPECT_NE(
      choice.text().find("; 16 MiB: 500 us through memory of the node, 900 us"),
      std::string::npos);
}

TEST(PeerChoice, NcclWhereNothingIsKnownOrBothAreAsFast) {
  EXPECT_FALSE(PeerChoice().peers(kMebi));
  EXPECT_EQ(PeerChoice().text(), "nothing was measured, NCCL carries all");
  EXPECT_FALSE(PeerChoice({{kMebi, 1e-3, 1e-3}}).peers(kMebi));
}

TEST(PeerChoice, TheSlowestRankCounts) {
  std::vector<std::string> calls;
  PeerTrial trial;
  trial.peers = [&](uint64_t bytes) {
    calls.push_back("peers " + std::to_string(bytes));
    return static_cast<double>(bytes);
  };
  trial.network = [&](uint64_t bytes) {
    calls.push_back("network " + std::to_string(bytes));
    return 2.0 * static_cast<double>(bytes);
  };
  // Another rank is slow through memory of the node at 1 MiB.
  trial.slowest = [](std::vector<double> own) {
    own.at(4) *= 3;
    return own;
  };
  const PeerChoice choice = measurePeers(trial);
  EXPECT_EQ(calls.size(), 2 * peerTrialBytes().size());
  EXPECT_EQ(calls.front(), "peers 4096");
  EXPECT_EQ(calls.back(), "network 16777216");
  EXPECT_TRUE(std::is_sorted(peerTrialBytes().begin(), peerTrialBytes().end()));
  EXPECT_TRUE(choice.peers(64 * kKibi));
  EXPECT_FALSE(choice.peers(kMebi));
  EXPECT_TRUE(choice.peers(16 * kMebi));
}

}  // namespace
}  // namespace automoe::testing
