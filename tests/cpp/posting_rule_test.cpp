// SPDX-License-Identifier: Apache-2.0
// The posting rule, checked over every interleaving of a small cluster, and
// two rules that look alike but fail.
#include "process_group/exchange/posting_rule.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "posting_model.hpp"

namespace automoe::testing {
namespace {

TEST(UnmatchedBudgetTest, LargePayloadsNeverRide) {
  UnmatchedBudget budget(10, 100);
  EXPECT_TRUE(budget.tryRide(10));
  EXPECT_FALSE(budget.tryRide(11));
  EXPECT_FALSE(budget.tryRide(std::numeric_limits<size_t>::max()));
  EXPECT_EQ(budget.unmatched(), 10);
}

TEST(UnmatchedBudgetTest, CapIsReachedButNotPassed) {
  UnmatchedBudget budget(10, 25);
  EXPECT_TRUE(budget.tryRide(10));
  EXPECT_TRUE(budget.tryRide(10));
  EXPECT_FALSE(budget.tryRide(6));
  EXPECT_TRUE(budget.tryRide(5));
  EXPECT_FALSE(budget.tryRide(1));
  EXPECT_TRUE(budget.tryRide(0));
  budget.matched(10);
  EXPECT_TRUE(budget.tryRide(10));
  EXPECT_EQ(budget.unmatched(), 25);
}

Program oneByOne(const std::vector<uint8_t>& order) {
  Program program;
  for (const uint8_t operation : order) {
    program.push_back({operation, true});
  }
  return program;
}

Program allAtOnce(const std::vector<uint8_t>& order) {
  Program program;
  for (const uint8_t operation : order) {
    program.push_back({operation, false});
  }
  return program;
}

void expectSound(const Cluster& cluster, const Outcome& outcome) {
  EXPECT_GT(outcome.states, 1000);
  EXPECT_GE(outcome.ends, 1);
  EXPECT_EQ(outcome.stuck, 0);
  EXPECT_EQ(outcome.capBroken, 0);
  EXPECT_EQ(outcome.deliveredTwice, 0);
  EXPECT_EQ(outcome.budgetLost, 0);
  EXPECT_LE(outcome.mostUnmatched, cluster.cap);
  ::testing::Test::RecordProperty("states", static_cast<int>(outcome.states));
}

// One rank of each kind is late somewhere in the search: the interleavings
// include those in which it posts after everybody else has come to a stop.

TEST(PostingRuleTest, TwoOperationsOneByOneEnd) {
  Cluster cluster;
  cluster.programs = {
      allAtOnce({0, 1}), oneByOne({0, 1}), oneByOne({0, 1}), oneByOne({0, 1})};
  cluster.bytes = {1, 1};
  cluster.largestRider = 2;
  cluster.cap = 2;  // one operation rides, the next has to wait
  const Outcome outcome = Model(cluster).explore();
  expectSound(cluster, outcome);
  EXPECT_EQ(outcome.mostUnmatched, 2);
  EXPECT_GT(outcome.waited, 0);
}

TEST(PostingRuleTest, TwoGroupsPostedInOppositeOrdersEnd) {
  Cluster cluster;  // operation 0 is of one group, operation 1 of the other
  cluster.programs = {
      allAtOnce({0, 1}),
      allAtOnce({1, 0}),
      allAtOnce({0, 1}),
      allAtOnce({1, 0})};
  cluster.bytes = {1, 1};
  cluster.largestRider = 2;
  cluster.cap = 2;
  expectSound(cluster, Model(cluster).explore());
}

TEST(PostingRuleTest, PayloadsThatAreTooLargeToRideEnd) {
  Cluster cluster;
  cluster.programs = {
      allAtOnce({0, 1}),
      allAtOnce({1, 0}),
      allAtOnce({1, 0}),
      allAtOnce({0, 1})};
  cluster.bytes = {2, 3};
  cluster.largestRider = 4;
  cluster.cap = 100;
  const Outcome outcome = Model(cluster).explore();
  expectSound(cluster, outcome);
  EXPECT_EQ(outcome.mostUnmatched, 0);
}

TEST(PostingRuleTest, ThreeSourcesEnd) {
  Cluster cluster;
  cluster.sources = 3;
  cluster.operations = 1;
  cluster.programs = {
      oneByOne({0}),
      oneByOne({0}),
      oneByOne({0}),
      oneByOne({0}),
      oneByOne({0})};
  cluster.bytes = {1, 1};
  cluster.largestRider = 2;
  cluster.cap = 2;
  expectSound(cluster, Model(cluster).explore());
}

// The check has teeth.

TEST(PostingRuleTest, CheckFindsTheDeadlockOfABoundedLandingRing) {
  Cluster cluster;
  cluster.rule = Rule::kBoundedLanding;
  // Source 0 runs ahead; its second payload takes the room that the first one
  // of the late source 1 needs, and the readers wait for that.
  cluster.programs = {
      allAtOnce({0, 1}), oneByOne({0, 1}), oneByOne({0, 1}), oneByOne({0, 1})};
  cluster.bytes = {1, 1};
  cluster.landing = 2;
  EXPECT_GT(Model(cluster).explore().stuck, 0);
  cluster.landing = 100;
  EXPECT_EQ(Model(cluster).explore().stuck, 0);
}

TEST(PostingRuleTest, CheckFindsABudgetThatIsGivenBackTooEarly) {
  Cluster cluster;
  cluster.rule = Rule::kEarlyRelease;
  cluster.programs = {
      allAtOnce({0, 1}),
      allAtOnce({0, 1}),
      allAtOnce({0, 1}),
      oneByOne({0, 1})};
  cluster.bytes = {1, 2};
  cluster.largestRider = 3;
  cluster.cap = 3;
  const Outcome broken = Model(cluster).explore();
  EXPECT_GT(broken.capBroken, 0);
  EXPECT_EQ(broken.mostUnmatched, 5);
  cluster.rule = Rule::kPosting;
  expectSound(cluster, Model(cluster).explore());
}

}  // namespace
}  // namespace automoe::testing
