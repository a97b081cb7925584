// SPDX-License-Identifier: Apache-2.0
// Progress without and with waiting threads, and the end of an engine.
#include "process_group/exchange/engine.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "buffers.hpp"
#include "processes.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

TEST(EngineTest, OperationsEndWhileNobodyWaits) {
  Ranks ranks(Shape{{2, 1}});
  for (const uint64_t bytes : {0, 100, 5000, 300000}) {
    std::vector<Posted> posted;
    for (int rank = 0; rank < ranks.size(); ++rank) {
      posted.push_back(
          post(ranks.group(rank), equalSizes(ranks.size(), bytes)));
    }
    for (const Posted& it : posted) {
      ASSERT_TRUE(eventually([&] { return it.operation->finished(); }))
          << bytes;
      EXPECT_EQ(it.operation->error(), nullptr);
      it.buffers->expectReceived();
    }
  }
}

TEST(EngineTest, CallbacksComeOnceAndInOrder) {
  Ranks ranks(Shape{{1, 1}});
  const Sizes sizes = equalSizes(2, 200000);
  ranks.run([&](int rank) {
    std::atomic<int> finished{0};
    std::atomic<int> released{0};
    std::atomic<bool> inOrder{true};
    Buffers buffers(sizes, rank);
    OperationCallbacks callbacks;
    callbacks.finished = [&] { finished += 1; };
    callbacks.released = [&] {
      inOrder = inOrder && finished == 1;
      released += 1;
    };
    const auto operation = ranks.group(rank).allToAll(
        buffers.arguments(), seconds(30), std::move(callbacks));
    finish(ranks.engine(rank), *operation);
    EXPECT_TRUE(eventually([&] { return released > 0; }));
    EXPECT_EQ(finished, 1);
    EXPECT_EQ(released, 1);
    EXPECT_TRUE(inOrder);
  });
}

TEST(EngineTest, ManyThreadsWaitForDifferentOperations) {
  constexpr int kThreads = 8;
  constexpr int kRounds = 20;
  Ranks ranks(Shape{{2, 2}});
  const Sizes sizes = equalSizes(ranks.size(), 3000);
  ranks.run([&](int rank) {
    for (int round = 0; round < kRounds; ++round) {
      std::vector<Posted> posted;
      for (int i = 0; i < kThreads; ++i) {
        posted.push_back(post(ranks.group(rank), sizes, i));
      }
      // The last one first, so that most threads wait while another drives.
      runThreads(kThreads, [&](int thread) {
        const auto index = static_cast<size_t>(kThreads - 1 - thread);
        finish(ranks.engine(rank), posted[index]);
      });
    }
  });
}

TEST(EngineTest, ManyThreadsWaitForTheSameOperation) {
  Ranks ranks(Shape{{2}});
  const Posted early = post(ranks.group(0), equalSizes(2, 50000));
  std::thread late([&] {
    std::this_thread::sleep_for(milliseconds(50));
    finish(ranks.engine(1), post(ranks.group(1), equalSizes(2, 50000)));
  });
  runThreads(6, [&](int) { finish(ranks.engine(0), early); });
  late.join();
}

TEST(EngineTest, WaitGivesUpAtItsDeadlineAndTheOperationGoesOn) {
  Ranks ranks(Shape{{2}});
  const Posted early = post(ranks.group(0), equalSizes(2, 100));
  const auto soon = [] { return Operation::Clock::now() + milliseconds(20); };
  EXPECT_FALSE(ranks.engine(0).wait(*early.operation, soon()));
  EXPECT_FALSE(early.operation->finished());
  expectContains(
      ranks.engine(0).waitsFor(*early.operation),
      "ranks that have not posted it: 1");
  const Posted late = post(ranks.group(1), equalSizes(2, 100));
  finish(ranks.engine(1), late);
  finish(ranks.engine(0), early);
  EXPECT_TRUE(ranks.engine(0).wait(*early.operation, soon()));
}

TEST(EngineTest, AWaiterThatGivesUpLeavesTheDrivingToTheOthers) {
  Ranks ranks(Shape{{2}});
  const Posted early = post(ranks.group(0), equalSizes(2, 100));
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      ranks.engine(0).wait(
          *early.operation, Operation::Clock::now() + milliseconds(10 + 5 * i));
    });
  }
  std::thread patient([&] { finish(ranks.engine(0), early); });
  for (std::thread& it : threads) {
    it.join();
  }
  finish(ranks.engine(1), post(ranks.group(1), equalSizes(2, 100)));
  patient.join();
}

TEST(EngineTest, CountersSeeTheNetworkAndTheMailboxes) {
  Ranks ranks(Shape{{1, 1}});
  const Sizes sizes = equalSizes(2, 1000);
  const EngineCounters before = ranks.engine(0).counters();
  ranks.run([&](int rank) {
    finish(ranks.engine(rank), post(ranks.group(rank), sizes));
  });
  const EngineCounters after = ranks.engine(0).counters();
  EXPECT_EQ(after.network.messagesSent, before.network.messagesSent + 1);
  EXPECT_EQ(
      after.network.messagesReceived, before.network.messagesReceived + 1);
  EXPECT_GE(after.network.bytesSent, before.network.bytesSent + 1000);
  EXPECT_LE(after.network.bytesSent, before.network.bytesSent + 1200);
  Ranks mates(Shape{{2}});
  EXPECT_GT(mates.engine(0).counters().nodeMemoryBytes, 0);
  EXPECT_EQ(mates.engine(0).counters().network.messagesSent, 0);
}

// Rank 0 has nothing to do any more but to refill the full mailbox of rank 1,
// and sleeps in between: a wake-up that got lost would leave rank 1 waiting.
TEST(EngineTest, FullMailboxIsRefilledByAnEngineThatSleeps) {
  constexpr int kCalls = 100;
  Ranks ranks(Shape{{2}});
  const auto other = ranks.join("other");
  const Sizes sizes = equalSizes(2, 8192);  // blocks that ride in a mailbox
  for (int round = 0; round < 100; ++round) {
    std::vector<Posted> first;
    std::vector<Posted> second;
    for (int call = 0; call < kCalls; ++call) {
      second.push_back(post(ranks.group(1), sizes, call, seconds(20)));
    }
    // A mailbox keeps order: then rank 0 has all of those.
    ranks.run([&](int rank) {
      Group& group = *other[static_cast<size_t>(rank)];
      finish(ranks.engine(rank), post(group, equalSizes(2, 1)));
    });
    for (int call = 0; call < kCalls; ++call) {
      first.push_back(post(ranks.group(0), sizes, call, seconds(20)));
    }
    for (const Posted& it : first) {
      finish(ranks.engine(0), it);
    }
    for (const Posted& it : second) {
      ASSERT_TRUE(eventually([&] { return it.operation->finished(); }));
      finish(ranks.engine(1), it);
    }
  }
}

// ---- the end ----

TEST(EngineTest, ShutdownEndsPendingOperations) {
  for (const Shape& shape : {Shape{{2}}, Shape{{1, 1}}}) {
    // After a failure sends may still be under way: buffers outlive engines.
    std::vector<Posted> posted;
    Ranks ranks(shape);
    for (const uint64_t bytes : {100, 1000000}) {
      posted.push_back(post(ranks.group(0), equalSizes(2, bytes)));
    }
    ranks.engine(0).shutdown(milliseconds(50));
    for (const Posted& it : posted) {
      ASSERT_TRUE(it.operation->finished());
      const std::string text = errorOf<TransportError>(
          [&] { std::rethrow_exception(it.operation->error()); });
      expectContains(text, "rank 0 destroyed group world");
      expectContains(text, "ranks that have not posted it: 1");
    }
    // And the other rank hears of it instead of waiting for it. All that its
    // first call needs may have come before; the second has to fail.
    EXPECT_THROW(
        for (const uint64_t bytes
             : {100, 1000000}) {
          posted.push_back(post(ranks.group(1), equalSizes(2, bytes)));
          finish(ranks.engine(1), posted.back());
        },
        Error);
  }
}

TEST(EngineTest, ShutdownEndsOperationsThatOtherThreadsPostMeanwhile) {
  std::vector<Posted> posted;
  Ranks ranks(Shape{{2}});
  posted.push_back(post(ranks.group(0), equalSizes(2, 100)));
  std::thread leaving([&] { ranks.group(0).leave(seconds(20)); });
  // Long enough for it to wait for the first operation in most runs.
  std::this_thread::sleep_for(milliseconds(100));
  try {
    posted.push_back(post(ranks.group(0), equalSizes(2, 100)));
  } catch (const InvalidArgument&) {
    // The group had been left already, which is as good.
  }
  const Posted other = post(ranks.group(1), equalSizes(2, 100));
  leaving.join();
  for (const Posted& it : posted) {
    EXPECT_TRUE(it.operation->finished());
  }
}

TEST(EngineTest, ShutdownIsIdempotentAndLaterUseIsAnError) {
  Ranks ranks(Shape{{2}});
  ranks.run([&](int rank) {
    ranks.engine(rank).shutdown(seconds(10));
    ranks.engine(rank).shutdown(seconds(10));
  });
  MemoryStore store;
  expectContains(
      errorOf<InvalidArgument>([&] {
        joinGroup(ranks.engine(0), store, 0, 1, "later", seconds(10));
      }),
      "has been shut down");
  expectContains(
      errorOf<InvalidArgument>([&] { post(ranks.group(0), equalSizes(2, 1)); }),
      "has been shut down");
}

TEST(EngineTest, ShutdownDeliversWhatWaitsForRoomInAMailbox) {
  constexpr int kCalls = 100;
  Ranks ranks(Shape{{2}});
  const auto other = ranks.join("other");
  const Sizes sizes = equalSizes(2, 8192);  // blocks that ride in a mailbox
  std::vector<Posted> first;
  std::vector<Posted> second;
  for (int call = 0; call < kCalls; ++call) {
    second.push_back(post(ranks.group(1), sizes, call, seconds(10)));
  }
  // A mailbox keeps order: then rank 0 has all of those.
  ranks.run([&](int rank) {
    Group& group = *other[static_cast<size_t>(rank)];
    finish(ranks.engine(rank), post(group, equalSizes(2, 1)));
  });
  std::thread shutdown;
  {
    // Rank 1 gets no processor, while rank 0 ends everything it has to do.
    const std::lock_guard frozen(ranks.engine(1).mutex());
    for (int call = 0; call < kCalls; ++call) {
      first.push_back(post(ranks.group(0), sizes, call));
    }
    for (const Posted& it : first) {
      finish(ranks.engine(0), it);
    }
    shutdown = std::thread([&] { ranks.engine(0).shutdown(seconds(20)); });
    std::this_thread::sleep_for(milliseconds(200));
  }
  EXPECT_NO_THROW({
    for (const Posted& it : second) {
      finish(ranks.engine(1), it);
    }
  });
  shutdown.join();
}

TEST(EngineTest, ShutdownWaitsForMatesThatStillReadWhatWasRelayed) {
  Ranks ranks(Shape{{1, 2}});
  const Sizes sizes = equalSizes(3, 10000);  // through an extent of rank 1
  std::vector<Posted> posted;
  posted.push_back(post(ranks.group(2), sizes));
  std::thread shutdown;
  {
    const std::lock_guard frozen(ranks.engine(2).mutex());
    posted.push_back(post(ranks.group(0), sizes));
    posted.push_back(post(ranks.group(1), sizes));
    shutdown = std::thread([&] { ranks.engine(1).shutdown(seconds(20)); });
    std::this_thread::sleep_for(milliseconds(200));
  }
  finish(ranks.engine(2), posted[0]);
  finish(ranks.engine(0), posted[1]);
  std::thread others([&] { ranks.engine(2).shutdown(seconds(20)); });
  shutdown.join();
  others.join();
  finish(ranks.engine(1), posted[2]);
}

TEST(EngineTest, NothingIsLeftOfEnginesThatAreGone) {
  const auto cycle = [] {
    Ranks ranks(Shape{{2, 1}});
    ranks.run([&](int rank) {
      finish(
          ranks.engine(rank),
          post(ranks.group(rank), equalSizes(ranks.size(), 20000)));
    });
  };
  cycle();  // what UCX keeps for the life of the process
  const auto descriptors = countDescriptors();
  const auto threads = countThreads();
  for (int i = 0; i < 10; ++i) {
    cycle();
  }
  EXPECT_EQ(countDescriptors(), descriptors);
  EXPECT_EQ(countThreads(), threads);
}

TEST(EngineTest, ForkedChildIsToldThatItCannotUseTheEngine) {
  Ranks ranks(Shape{{2}});
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    ranks.engine(0).markForked();
    MemoryStore store;
    const std::string text = errorOf<InvalidArgument>(
        [&] { joinGroup(ranks.engine(0), store, 0, 1, "child", seconds(1)); });
    ::_exit(text.find("was forked") == std::string::npos ? 1 : 0);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  // The parent goes on.
  ranks.run([&](int rank) {
    finish(ranks.engine(rank), post(ranks.group(rank), equalSizes(2, 100)));
  });
}

}  // namespace
}  // namespace automoe::testing
