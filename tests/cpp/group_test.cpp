// SPDX-License-Identifier: Apache-2.0
// How groups live beside each other, and how they end.
#include "process_group/exchange/group.hpp"

#include <gtest/gtest.h>

#include "buffers.hpp"
#include "processes.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

class GroupTest : public ::testing::TestWithParam<Shape> {};

// A group of one rank, and calls that cannot be right.

TEST(LonelyGroupTest, CopiesItsBlockAtOnce) {
  Ranks ranks(Shape{{1}});
  const Posted posted = post(ranks.group(0), equalSizes(1, 5000));
  EXPECT_TRUE(posted.operation->finished());
  finish(ranks.engine(0), posted);
}

TEST(LonelyGroupTest, BlocksThatDoNotFitTheGroupAreErrors) {
  Ranks ranks(Shape{{1}});
  expectContains(
      errorOf<InvalidArgument>(
          [&] { ranks.group(0).allToAll({}, seconds(1), {}); }),
      "0 input and 0 output blocks, expected one for each of 1 ranks");
  std::byte input[8] = {};
  std::byte output[4] = {};
  AllToAllArguments arguments;
  arguments.sends = {{input, 8}};
  arguments.receives = {{output, 4}};
  expectContains(
      errorOf<InvalidArgument>(
          [&] { ranks.group(0).allToAll(arguments, seconds(1), {}); }),
      "rank 0 sends 8 bytes to itself, but expects 4");
  finish(ranks.engine(0), post(ranks.group(0), equalSizes(1, 1)));
}

// Leaving.

TEST_P(GroupTest, CallAfterLeavingIsAnError) {
  Ranks ranks(GetParam());
  ranks.run([&](int rank) {
    ranks.group(rank).leave(seconds(10));
    ranks.group(rank).leave(seconds(10));
    expectContains(
        errorOf<InvalidArgument>(
            [&] { post(ranks.group(rank), equalSizes(ranks.size(), 1)); }),
        "group world has been destroyed on this rank");
  });
}

TEST_P(GroupTest, RankThatLeftFailsTheOthersNextOperationByName) {
  std::vector<Posted> posted(static_cast<size_t>(GetParam().size()));
  Ranks ranks(GetParam());
  const Sizes sizes = equalSizes(ranks.size(), 500);
  const int last = ranks.size() - 1;
  ranks.run([&](int rank) {
    finish(ranks.engine(rank), post(ranks.group(rank), sizes));
  });
  ranks.run([&](int rank) {
    if (rank == last) {
      ranks.group(rank).leave(seconds(10));
      return;
    }
    Posted& next = posted[static_cast<size_t>(rank)];
    const std::string text = errorOf<PeerFailedError>([&] {
      next = post(ranks.group(rank), sizes);
      finish(ranks.engine(rank), next);
    });
    expectContains(text, concat("rank ", last, " has left group world"));
    // It stays failed, and says so again.
    EXPECT_NE(ranks.group(rank).failure(), nullptr);
    expectContains(
        errorOf<PeerFailedError>([&] { post(ranks.group(rank), sizes); }),
        concat("rank ", last, " has left group world"));
  });
}

TEST_P(GroupTest, LeavingWaitsForWhatHasBeenPosted) {
  std::vector<Posted> posted(static_cast<size_t>(GetParam().size()));
  Ranks ranks(GetParam());
  const Sizes sizes = equalSizes(ranks.size(), 100000);
  ranks.run([&](int rank) {
    std::this_thread::sleep_for(milliseconds(20 * rank));
    posted[static_cast<size_t>(rank)] = post(ranks.group(rank), sizes);
    ranks.group(rank).leave(seconds(20));
    EXPECT_TRUE(posted[static_cast<size_t>(rank)].operation->finished());
    finish(ranks.engine(rank), posted[static_cast<size_t>(rank)]);
  });
}

TEST_P(GroupTest, LeavingLeavesOtherGroupsAlone) {
  Ranks ranks(GetParam());
  const auto other = ranks.join("other");
  ranks.run([&](int rank) {
    Group& group = *other[static_cast<size_t>(rank)];
    finish(ranks.engine(rank), post(group, equalSizes(ranks.size(), 30000)));
    ranks.group(rank).leave(seconds(10));
    finish(ranks.engine(rank), post(group, equalSizes(ranks.size(), 30000)));
  });
}

// Failing.

TEST_P(GroupTest, AbortEndsTheWaitsOfAllRanks) {
  std::vector<Posted> posted(static_cast<size_t>(GetParam().size()));
  Ranks ranks(GetParam());
  const Sizes sizes = equalSizes(ranks.size(), 200000);
  const int last = ranks.size() - 1;
  ranks.run([&](int rank) {
    finish(ranks.engine(rank), post(ranks.group(rank), sizes));
  });
  ranks.run([&](int rank) {
    if (rank == last) {
      EXPECT_EQ(ranks.group(rank).failure(), nullptr);
      std::this_thread::sleep_for(milliseconds(30));
      ranks.group(rank).abort("the loss is not a number");
      EXPECT_NE(ranks.group(rank).failure(), nullptr);
      return;
    }
    Posted& next = posted[static_cast<size_t>(rank)];
    const std::string text = errorOf<TransportError>([&] {
      next = post(ranks.group(rank), sizes);
      finish(ranks.engine(rank), next);
    });
    expectContains(
        text,
        concat(
            "rank ", last, " aborted group world: the loss is not a number"));
    expectContains(text, "destroy it");
  });
}

TEST_P(GroupTest, FailureOfOneGroupLeavesTheOperationsOfAnotherAlone) {
  std::vector<Posted> posted(static_cast<size_t>(GetParam().size()));
  Ranks ranks(GetParam());
  const auto other = ranks.join("other");
  for (const uint64_t bytes : {3000, 1 << 20}) {
    const Sizes sizes = equalSizes(ranks.size(), bytes);
    posted[0] = post(ranks.group(0), sizes, 0, seconds(10));
    other[0]->abort("on purpose");
    for (int rank = 1; rank < ranks.size(); ++rank) {
      posted[static_cast<size_t>(rank)] =
          post(ranks.group(rank), sizes, 0, seconds(10));
    }
    for (int rank = 0; rank < ranks.size(); ++rank) {
      EXPECT_NO_THROW(
          finish(ranks.engine(rank), posted[static_cast<size_t>(rank)]));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    GroupTest,
    ::testing::Values(
        Shape{{2}},
        Shape{{2}, false},
        Shape{{1, 1}},
        Shape{{2, 2}},
        Shape{{3, 1}}),
    [](const auto& info) {
      std::string name;
      for (int ranks : info.param.ranksPerNode) {
        name += (name.empty() ? "" : "_") + std::to_string(ranks);
      }
      return name + (info.param.crossMemory ? "" : "_staged");
    });

// Memory.

/// Ranks 1 and 2 share a node; packets for both come to rank 1.
class RelayTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kBlock = 8192;
  static constexpr size_t kCap = 8 * kBlock;

  RelayTest()
      : ranks_(
            Shape{{1, 2}},
            [](Config& config) { config.unmatchedBytes = kCap; }),
        other_(ranks_.join("other")) {
    barrier();
  }

  /// What ranks have sent before it has arrived when it ends.
  void barrier() {
    ranks_.run([&](int rank) {
      Group& group = *other_[static_cast<size_t>(rank)];
      finish(ranks_.engine(rank), post(group, equalSizes(3, 1)));
    });
  }
  size_t relayBytes() { return ranks_.engine(1).counters().nodeMemoryBytes; }

  std::vector<Posted> posted_;  // before the engines: it outlives them
  Ranks ranks_;
  std::vector<std::shared_ptr<Group>> other_;
};

TEST_F(RelayTest, MemoryForALateRankStaysBelowTheCapWhenItsMateIsEarly) {
  constexpr int kCalls = 100;
  Sizes sizes = equalSizes(3, 0);
  sizes[0] = {0, 16, kBlock};
  const auto postAll = [&](int rank) {
    for (int call = 0; call < kCalls; ++call) {
      posted_.push_back(post(ranks_.group(rank), sizes, call));
    }
  };
  const size_t before = relayBytes();
  postAll(1);
  barrier();
  postAll(0);
  barrier();
  const size_t held = relayBytes() - before;
  EXPECT_GT(held, 0);
  EXPECT_LE(held, kCap + kCalls * 2 * ExtentAllocator::kAlignment);
  postAll(2);
  for (size_t i = 0; i < posted_.size(); ++i) {
    const int rank = std::array{1, 0, 2}[i / kCalls];
    finish(ranks_.engine(rank), posted_[i]);
  }
}

TEST_F(RelayTest, MemoryForALateRankStaysBelowTheCapWhenItsMateIsLateToo) {
  constexpr int kCalls = 100;
  Sizes sizes = equalSizes(3, 0);
  sizes[0] = {0, 16, kBlock};
  const size_t before = relayBytes();
  for (int rank = 0; rank < 3; ++rank) {
    for (int call = 0; call < kCalls; ++call) {
      posted_.push_back(post(ranks_.group(rank), sizes, call));
    }
    if (rank < 2) {
      barrier();
      EXPECT_LE(
          relayBytes() - before,
          kCap + kCalls * 2 * ExtentAllocator::kAlignment);
    }
  }
  for (size_t i = 0; i < posted_.size(); ++i) {
    finish(ranks_.engine(static_cast<int>(i) / kCalls), posted_[i]);
  }
}

TEST_F(RelayTest, PartsForAMateThatHasFailedAreFreed) {
  const size_t before = relayBytes();
  {
    // Rank 2 fails with the relayed part unread in its mailbox.
    const std::lock_guard frozen(ranks_.engine(2).mutex());
    posted_.push_back(post(ranks_.group(0), equalSizes(3, kBlock)));
    for (int i = 0; i < 20000 && relayBytes() == before; ++i) {
      std::this_thread::sleep_for(milliseconds(1));
    }
    ASSERT_GT(relayBytes(), before);
    ranks_.group(2).fail(FailureKind::kAborted, "on purpose");
  }
  barrier();  // a mailbox keeps order, so rank 2 has seen the part
  for (int i = 0; i < 100 && relayBytes() > before; ++i) {
    barrier();  // and the relay gets to collect
  }
  EXPECT_EQ(relayBytes(), before);
}

TEST(StagedMemoryTest, ChunksForAMateThatHasFailedAreFreed) {
  std::vector<Posted> posted;
  Ranks ranks(Shape{{2}, false});
  const auto other = ranks.join("other");
  const auto barrier = [&] {
    ranks.run([&](int rank) {
      Group& group = *other[static_cast<size_t>(rank)];
      finish(ranks.engine(rank), post(group, equalSizes(2, 1)));
    });
  };
  const auto held = [&] { return ranks.engine(0).counters().nodeMemoryBytes; };
  Sizes sizes = equalSizes(2, 0);
  sizes[0][1] = 1 << 20;
  posted.push_back(post(ranks.group(1), sizes));
  barrier();  // rank 0 has its record, so that it may send
  const size_t before = held();
  {
    const std::lock_guard frozen(ranks.engine(1).mutex());
    posted.push_back(post(ranks.group(0), sizes));
    for (int i = 0; i < 20000 && held() == before; ++i) {
      std::this_thread::sleep_for(milliseconds(1));
    }
    ASSERT_GT(held(), before);
    ranks.group(1).fail(FailureKind::kAborted, "on purpose");
  }
  barrier();
  for (int i = 0; i < 100 && held() > before; ++i) {
    barrier();  // the sender gets to collect
  }
  EXPECT_EQ(held(), before);
}

TEST(GroupCyclesTest, JoiningAndLeavingManyTimesLeavesNothing) {
  Ranks ranks(Shape{{2, 1}});
  const auto cycle = [&](int i) {
    const auto groups = ranks.join(concat("group ", i));
    ranks.run([&](int rank) {
      Group& group = *groups[static_cast<size_t>(rank)];
      finish(ranks.engine(rank), post(group, equalSizes(ranks.size(), 10000)));
      group.leave(seconds(10));
    });
  };
  const auto memory = [&] {
    size_t total = 0;
    for (int rank = 0; rank < ranks.size(); ++rank) {
      total += ranks.engine(rank).counters().nodeMemoryBytes;
    }
    return total;
  };
  // A call on another group lets every engine collect.
  const auto settled = [&] {
    ranks.run([&](int rank) {
      finish(
          ranks.engine(rank),
          post(ranks.group(rank), equalSizes(ranks.size(), 1)));
    });
    return memory();
  };
  cycle(0);
  const size_t bytes = settled();
  const auto descriptors = countDescriptors();
  const auto threads = countThreads();
  for (int i = 1; i <= 200; ++i) {
    cycle(i);
  }
  size_t after = settled();
  for (int i = 0; i < 100 && after > bytes; ++i) {
    after = settled();
  }
  EXPECT_EQ(after, bytes);
  EXPECT_EQ(countDescriptors(), descriptors);
  EXPECT_EQ(countThreads(), threads);
}

}  // namespace
}  // namespace automoe::testing
