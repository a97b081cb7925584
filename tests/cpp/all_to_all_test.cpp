// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/all_to_all.hpp"

#include <gtest/gtest.h>

#include <random>

#include "buffers.hpp"
#include "ranks.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

void exchange(Ranks& ranks, const Sizes& sizes, int round) {
  ranks.run([&](int rank) {
    Buffers call(sizes, rank, round);
    const auto operation =
        ranks.group(rank).allToAll(call.arguments(), seconds(20), {});
    finish(ranks.engine(rank), *operation);
    call.expectReceived();
  });
}

class AllToAllTest : public ::testing::TestWithParam<Shape> {};

TEST_P(AllToAllTest, EverySizeClass) {
  Ranks ranks(GetParam());
  const auto size = static_cast<size_t>(ranks.size());
  int round = 0;
  for (uint64_t bytes : {0, 1, 7, 2048, 8192, 8193, 70000, 1000003}) {
    exchange(ranks, Sizes(size, std::vector<uint64_t>(size, bytes)), round++);
  }
}

TEST_P(AllToAllTest, UnevenSizesWithZeros) {
  Ranks ranks(GetParam());
  const auto size = static_cast<size_t>(ranks.size());
  std::mt19937_64 random(7);
  for (int round = 0; round < 40; ++round) {
    Sizes sizes(size, std::vector<uint64_t>(size));
    for (auto& row : sizes) {
      for (auto& bytes : row) {
        const uint64_t bound = uint64_t{1} << (random() % 18);
        bytes = random() % 3 == 0 ? 0 : random() % bound;
      }
    }
    exchange(ranks, sizes, round);
  }
}

TEST_P(AllToAllTest, EverythingToOneRankAndOneSilent) {
  Ranks ranks(GetParam());
  const auto size = static_cast<size_t>(ranks.size());
  for (size_t hot = 0; hot < size; ++hot) {
    Sizes sizes(size, std::vector<uint64_t>(size));
    for (size_t source = 0; source < size; ++source) {
      sizes[source][hot] = source == 0 ? 0 : 200000;
    }
    exchange(ranks, sizes, static_cast<int>(hot));
  }
}

TEST_P(AllToAllTest, EqualRowsCrossOnce) {
  Ranks ranks(GetParam());
  const auto size = static_cast<size_t>(ranks.size());
  constexpr size_t kRow = 512;
  constexpr size_t kRows = 300;
  // Row i of every block of a rank is the same, but for one block.
  const auto value = [](size_t source, size_t target, size_t row) {
    return static_cast<std::byte>(
        source * 50 + row + (target == 0 && row % 5 == 0 ? 1000 : 0));
  };
  for (int round = 0; round < 3; ++round) {
    ranks.run([&](int rank) {
      std::vector<std::vector<std::byte>> inputs(size);
      std::vector<std::vector<std::byte>> outputs(size);
      AllToAllArguments arguments;
      arguments.rowBytes = kRow;
      for (size_t peer = 0; peer < size; ++peer) {
        for (size_t row = 0; row < kRows; ++row) {
          inputs[peer].insert(
              inputs[peer].end(),
              kRow,
              value(static_cast<size_t>(rank), peer, row));
        }
        outputs[peer].resize(kRow * kRows);
        arguments.sends.push_back({inputs[peer].data(), kRow * kRows});
        arguments.receives.push_back({outputs[peer].data(), kRow * kRows});
      }
      if (rank == round) {
        std::this_thread::sleep_for(milliseconds(20));  // late
      }
      const auto operation =
          ranks.group(rank).allToAll(std::move(arguments), seconds(20), {});
      finish(ranks.engine(rank), *operation);
      for (size_t peer = 0; peer < size; ++peer) {
        for (size_t i = 0; i < kRow * kRows; ++i) {
          ASSERT_EQ(
              outputs[peer][i],
              value(peer, static_cast<size_t>(rank), i / kRow));
        }
      }
    });
  }
  const Topology& topology = ranks.group(0).topology();
  const GroupCounters counters = ranks.group(0).counters();
  bool anyShared = false;
  for (int node = 1; node < topology.numNodes(); ++node) {
    anyShared = anyShared || topology.ranksOf(node).size() > 1;
  }
  EXPECT_EQ(counters.mergedCasts > 0, anyShared);
}

TEST_P(AllToAllTest, ManyInFlight) {
  Ranks ranks(GetParam());
  const auto size = static_cast<size_t>(ranks.size());
  const Sizes sizes(size, std::vector<uint64_t>(size, 300));
  ranks.run([&](int rank) {
    std::vector<std::unique_ptr<Buffers>> calls;
    std::vector<std::shared_ptr<Operation>> operations;
    for (int i = 0; i < 1000; ++i) {
      calls.push_back(std::make_unique<Buffers>(sizes, rank, i));
      operations.push_back(ranks.group(rank).allToAll(
          calls.back()->arguments(), seconds(60), {}));
    }
    for (size_t i = 0; i < calls.size(); ++i) {
      finish(ranks.engine(rank), *operations[i]);
      calls[i]->expectReceived();
    }
  });
}

TEST_P(AllToAllTest, CompletesWithoutWait) {
  Ranks ranks(GetParam());
  const auto size = static_cast<size_t>(ranks.size());
  for (uint64_t bytes : {100, 100000}) {
    const Sizes sizes(size, std::vector<uint64_t>(size, bytes));
    ranks.run([&](int rank) {
      Buffers call(sizes, rank, 0);
      std::atomic<bool> released{false};
      OperationCallbacks callbacks;
      callbacks.released = [&] { released = true; };
      const auto operation = ranks.group(rank).allToAll(
          call.arguments(), seconds(60), std::move(callbacks));
      while (!operation->finished() || !released) {
        std::this_thread::yield();
      }
      EXPECT_EQ(operation->error(), nullptr);
      call.expectReceived();
    });
  }
}

TEST_P(AllToAllTest, DisagreementNamesBothRanksAndNumbers) {
  if (GetParam().size() < 2) {
    return;
  }
  for (uint64_t bytes : {64, 100000}) {
    const auto size = static_cast<size_t>(GetParam().size());
    const Sizes sizes(size, std::vector<uint64_t>(size, bytes));
    Sizes wrong = sizes;
    const size_t last = size - 1;
    wrong[0][last] = bytes + 16;  // rank 0 sends more than the last expects
    // After a failure sends may still be under way: the buffers outlive them.
    std::vector<std::unique_ptr<Buffers>> calls(size);
    Ranks ranks(GetParam());
    ranks.run([&](int rank) {
      auto& kept = calls[static_cast<size_t>(rank)];
      kept = std::make_unique<Buffers>(rank == 0 ? wrong : sizes, rank, 0);
      Buffers& call = *kept;
      std::string text;
      for (int use = 0; use < 2 && text.empty(); ++use) {
        try {
          const auto operation =
              ranks.group(rank).allToAll(call.arguments(), seconds(20), {});
          finish(ranks.engine(rank), *operation);
          // A rank that is not concerned may see it at its next use only.
          EXPECT_TRUE(rank != 0 && rank != static_cast<int>(last));
        } catch (const InvalidArgument& error) {
          text = error.what();
        }
      }
      EXPECT_NE(text.find("rank 0 sends"), std::string::npos) << text;
      EXPECT_NE(text.find(concat("to rank ", last)), std::string::npos) << text;
      EXPECT_NE(text.find(std::to_string(bytes + 16)), std::string::npos);
      EXPECT_NE(text.find(std::to_string(bytes) + " bytes"), std::string::npos);
    });
  }
}

TEST_P(AllToAllTest, LateRankCostsItsPeersWaitingOnly) {
  Ranks ranks(GetParam());
  const auto size = static_cast<size_t>(ranks.size());
  const Sizes sizes(size, std::vector<uint64_t>(size, 50000));
  ranks.run([&](int rank) {
    if (rank == 0) {
      std::this_thread::sleep_for(milliseconds(300));
    }
    std::vector<std::unique_ptr<Buffers>> calls;
    std::vector<std::shared_ptr<Operation>> operations;
    for (int i = 0; i < 20; ++i) {
      calls.push_back(std::make_unique<Buffers>(sizes, rank, i));
      operations.push_back(ranks.group(rank).allToAll(
          calls.back()->arguments(), seconds(60), {}));
    }
    for (size_t i = 0; i < calls.size(); ++i) {
      finish(ranks.engine(rank), *operations[i]);
      calls[i]->expectReceived();
    }
  });
  // Everything that was kept for the late rank is free again.
  const uint64_t mailboxes = ranks.engine(0).counters().nodeMemoryBytes;
  ranks.run([&](int rank) {
    Buffers call(sizes, rank, 0);
    finish(
        ranks.engine(rank),
        *ranks.group(rank).allToAll(call.arguments(), seconds(20), {}));
  });
  EXPECT_LE(ranks.engine(0).counters().nodeMemoryBytes, mailboxes + (1 << 20));
}

TEST_P(AllToAllTest, DeadlineNamesWhoIsMissing) {
  if (GetParam().size() < 2) {
    return;
  }
  const auto size = static_cast<size_t>(GetParam().size());
  const Sizes sizes(size, std::vector<uint64_t>(size, 100));
  std::vector<std::unique_ptr<Buffers>> calls(size);
  Ranks ranks(GetParam());
  const auto other = ranks.join("other");
  exchange(ranks, sizes, 0);  // connects
  const int last = ranks.size() - 1;
  const auto begin = [&](int rank, milliseconds timeout) {
    auto& call = calls[static_cast<size_t>(rank)];
    call = std::make_unique<Buffers>(sizes, rank, 0);
    return ranks.group(rank).allToAll(call->arguments(), timeout, {});
  };
  ranks.run([&](int rank) {
    std::shared_ptr<Operation> operation;
    if (rank != 0 && rank != last) {
      operation = begin(rank, seconds(20));
    }
    // What comes after it on the same ways: now rank 0 knows of all of these.
    finish(ranks.engine(rank), post(*other[static_cast<size_t>(rank)], sizes));
    if (rank == last) {
      return;
    }
    if (rank == 0) {
      operation = begin(rank, milliseconds(200));
    }
    ranks.engine(rank).wait(*operation, Operation::Clock::now() + seconds(30));
    ASSERT_NE(operation->error(), nullptr);
    try {
      std::rethrow_exception(operation->error());
    } catch (const TimeoutError& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find("rank 0 timed out"), std::string::npos) << text;
      EXPECT_NE(text.find(concat("not posted it: ", last)), std::string::npos)
          << text;
    }
  });
}

TEST_P(AllToAllTest, TwoGroupsFromTwoThreadsInOppositeOrder) {
  Ranks ranks(GetParam());
  const auto other = ranks.join("other");
  const auto size = static_cast<size_t>(ranks.size());
  const Sizes sizes(size, std::vector<uint64_t>(size, 90000));
  ranks.run([&](int rank) {
    runThreads(2, [&](int thread) {
      for (int i = 0; i < 10; ++i) {
        Buffers call(sizes, rank, thread);
        Group& group = (thread + rank) % 2 == 0
                           ? ranks.group(rank)
                           : *other[static_cast<size_t>(rank)];
        // What a group carries must not depend on the thread.
        Buffers same(sizes, rank, &group == &ranks.group(rank) ? 1 : 2);
        finish(
            ranks.engine(rank),
            *group.allToAll(same.arguments(), seconds(60), {}));
        same.expectReceived();
      }
    });
  });
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    AllToAllTest,
    ::testing::Values(
        Shape{{1}},
        Shape{{2}},
        Shape{{4}, false},
        Shape{{1, 1}},
        Shape{{2, 2}},
        Shape{{2, 2}, false},
        Shape{{3, 3, 2}},
        Shape{{1, 1, 1, 1}}),
    [](const auto& info) {
      std::string name;
      for (int ranks : info.param.ranksPerNode) {
        name += (name.empty() ? "" : "_") + std::to_string(ranks);
      }
      return name + (info.param.crossMemory ? "" : "_staged");
    });

}  // namespace
}  // namespace automoe::testing
