// SPDX-License-Identifier: Apache-2.0
// Collectives by schedule on real engines: bytes, flow control, errors.
#include "process_group/exchange/scheduled.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>

#include "buffers.hpp"
#include "process_group/exchange/schedules.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using Bytes = std::vector<std::byte>;

const char* typeName(uint8_t type) {
  return type == 0 ? "int64" : "float32";
}
const char* operationName(uint8_t operation) {
  return operation == 0 ? "SUM" : "MAX";
}

ScheduledArguments arguments(
    OperationKind kind, Schedule schedule, uint64_t total = 0, int root = 0) {
  ScheduledArguments made;
  made.schedule = std::move(schedule);
  made.description.operation = kind;
  made.description.total = total;
  made.description.root = root;
  made.description.dtypeName = &typeName;
  made.description.reductionName = &operationName;
  made.reduction.type = kernels::ElementType::kInt64;
  return made;
}

Bytes pattern(uint64_t bytes, int rank, int call) {
  Bytes block(bytes);
  uint64_t state = static_cast<uint64_t>(rank * 89 + call + 1);
  for (std::byte& it : block) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    it = static_cast<std::byte>(state >> 56);
  }
  return block;
}

/// One call of one rank, with its memory.
struct Call {
  Bytes from;
  std::vector<Bytes> to;
  std::shared_ptr<Operation> operation;
};

Call allGather(
    Group& group,
    uint64_t bytes,
    int call,
    milliseconds timeout = seconds(30)) {
  const Topology& topology = group.topology();
  Call made;
  made.from = pattern(bytes, topology.rank(), call);
  made.to.assign(static_cast<size_t>(topology.size()), Bytes(bytes));
  std::vector<Block> to;
  for (Bytes& it : made.to) {
    to.push_back({it.data(), it.size()});
  }
  made.operation = group.collective(
      arguments(
          OperationKind::kAllGather,
          makeAllGather(topology, {made.from.data(), bytes}, to),
          bytes * to.size()),
      timeout,
      {});
  return made;
}

void expectGathered(const Call& call, int number) {
  for (size_t rank = 0; rank < call.to.size(); ++rank) {
    EXPECT_TRUE(
        call.to[rank] ==
        pattern(call.from.size(), static_cast<int>(rank), number))
        << "wrong bytes of rank " << rank << " in call " << number;
  }
}

Call broadcast(Group& group, int root, uint64_t bytes, int call) {
  const Topology& topology = group.topology();
  Call made;
  made.from =
      topology.rank() == root ? pattern(bytes, root, call) : Bytes(bytes);
  made.operation = group.collective(
      arguments(
          OperationKind::kBroadcast,
          makeBroadcast(topology, root, made.from.data(), bytes),
          bytes,
          root),
      seconds(30),
      {});
  return made;
}

struct SumCall {
  std::vector<int64_t> numbers;
  std::shared_ptr<Operation> operation;
};

SumCall allReduce(Group& group, size_t count, int64_t base) {
  const Topology& topology = group.topology();
  SumCall made;
  for (size_t i = 0; i < count; ++i) {
    made.numbers.push_back(
        base + static_cast<int64_t>(i) * (topology.rank() + 1));
  }
  auto* data = reinterpret_cast<std::byte*>(made.numbers.data());
  const kernels::Reduction reduction{kernels::ElementType::kInt64};
  made.operation = group.collective(
      arguments(
          OperationKind::kAllReduce,
          makeAllReduce(topology, reduction, data, data, count * 8),
          count * 8),
      seconds(30),
      {});
  return made;
}

void expectSum(const SumCall& call, int ranks, int64_t base) {
  for (size_t i = 0; i < call.numbers.size(); ++i) {
    ASSERT_EQ(
        call.numbers[i],
        base * ranks + static_cast<int64_t>(i) * (ranks * (ranks + 1) / 2));
  }
}

class ScheduledTest : public ::testing::TestWithParam<Shape> {};

TEST_P(ScheduledTest, BytesOfAllSizesArrive) {
  Ranks ranks(GetParam());
  ranks.run([&](int rank) {
    Engine& engine = ranks.engine(rank);
    Group& group = ranks.group(rank);
    int number = 0;
    for (const uint64_t bytes : {0, 1, 1000, 9000, 61'000, 70'000, 1'500'000}) {
      const Call gathered = allGather(group, bytes, number);
      finish(engine, *gathered.operation);
      expectGathered(gathered, number);
      const int root = number % ranks.size();
      const Call got = broadcast(group, root, bytes, number);
      finish(engine, *got.operation);
      EXPECT_TRUE(got.from == pattern(bytes, root, number));
      const size_t count = bytes / 8;
      const SumCall sum = allReduce(group, count, number);
      finish(engine, *sum.operation);
      expectSum(sum, ranks.size(), number);
      number += 1;
    }
  });
}

TEST_P(ScheduledTest, ManyUnderWayEndInAnyOrder) {
  Ranks ranks(GetParam());
  ranks.run([&](int rank) {
    std::vector<Call> gathers;
    std::vector<SumCall> sums;
    for (int number = 0; number < 100; ++number) {
      gathers.push_back(allGather(
          ranks.group(rank), number % 10 == 0 ? 70'000 : 300, number));
      sums.push_back(allReduce(ranks.group(rank), 100, number));
    }
    for (int number = 99; number >= 0; --number) {
      const auto index = static_cast<size_t>(number);
      finish(ranks.engine(rank), *gathers[index].operation);
      finish(ranks.engine(rank), *sums[index].operation);
      expectGathered(gathers[index], number);
      expectSum(sums[index], ranks.size(), number);
    }
  });
}

TEST_P(ScheduledTest, RootRunsAheadWithinTheBudgetAndBeyond) {
  Ranks ranks(
      GetParam(), [](Config& config) { config.unmatchedBytes = 64 * 1024; });
  constexpr int kCalls = 200;
  std::vector<std::vector<Call>> calls(static_cast<size_t>(ranks.size()));
  const auto call = [&](int rank) {
    for (int number = 0; number < kCalls; ++number) {
      calls[static_cast<size_t>(rank)].push_back(
          broadcast(ranks.group(rank), 0, 4000, number));
    }
  };
  call(0);  // nobody else has posted anything
  ranks.run([&](int rank) {
    if (rank != 0) {
      call(rank);
    }
  });
  ranks.run([&](int rank) {
    for (int number = 0; number < kCalls; ++number) {
      const Call& it =
          calls[static_cast<size_t>(rank)][static_cast<size_t>(number)];
      finish(ranks.engine(rank), *it.operation);
      EXPECT_TRUE(it.from == pattern(4000, 0, number));
    }
  });
}

TEST_P(ScheduledTest, BarrierHoldsEverybodyBack) {
  Ranks ranks(GetParam());
  std::atomic<int> here{0};
  ranks.run([&](int rank) {
    for (int round = 1; round <= 20; ++round) {
      if (rank == round % ranks.size()) {
        std::this_thread::sleep_for(milliseconds(2));
      }
      here += 1;
      const auto barrier = ranks.group(rank).collective(
          arguments(
              OperationKind::kBarrier,
              makeBarrier(ranks.group(rank).topology())),
          seconds(30),
          {});
      finish(ranks.engine(rank), *barrier);
      EXPECT_GE(here.load(), round * ranks.size());
    }
  });
}

template <typename Post>
void expectMismatch(
    const Shape& shape, const Post& post, const std::string& part) {
  std::vector<Call> calls(static_cast<size_t>(shape.size()));
  Ranks ranks(shape);
  ranks.run([&](int rank) {
    const std::string text = errorOf<InvalidArgument>([&] {
      Call& call = calls[static_cast<size_t>(rank)];
      call = post(ranks.group(rank), rank);
      finish(ranks.engine(rank), *call.operation);
      // A rank that needed nothing hears of it at its next call.
      call = allGather(ranks.group(rank), 8, 0);
      finish(ranks.engine(rank), *call.operation);
    });
    expectContains(text, part);
  });
}

TEST_P(ScheduledTest, OtherRootsFailEveryRankWithBothValues) {
  expectMismatch(
      GetParam(),
      [](Group& group, int rank) {
        return broadcast(group, rank == 1 ? 1 : 0, 100, 0);
      },
      "has the root ");
}

TEST_P(ScheduledTest, OtherSizesFailEveryRankWithBothValues) {
  expectMismatch(
      GetParam(),
      [](Group& group, int rank) {
        return allGather(group, rank == 1 ? 90'000 : 100, 0);
      },
      "has bytes in all: ");
}

TEST_P(ScheduledTest, OtherCollectiveFailsEveryRankByName) {
  expectMismatch(
      GetParam(),
      [](Group& group, int rank) {
        return rank == 1 ? broadcast(group, 1, 100, 0)
                         : allGather(group, 100, 0);
      },
      "all_gather on rank ");
}

TEST_P(ScheduledTest, LateRankIsNamedAtTheTimeout) {
  const Shape shape = GetParam();
  std::vector<Call> calls(static_cast<size_t>(shape.size()));
  std::atomic<int> posted{0};
  Ranks ranks(shape);
  ranks.run([&](int rank) {
    if (rank == 1) {
      return;
    }
    if (rank == 0) {
      // It gives up first; then all others have called.
      EXPECT_TRUE(eventually([&] { return posted == shape.size() - 2; }));
    }
    Call& call = calls[static_cast<size_t>(rank)];
    call = allGather(
        ranks.group(rank), 100, 0, milliseconds(rank == 0 ? 300 : 30000));
    posted += 1;
    const std::string text = errorOf<TimeoutError>(
        [&] { finish(ranks.engine(rank), *call.operation); });
    expectContains(text, "timed out in all_gather number 0 of group world");
    expectContains(text, "bytes from ranks: ");
    expectContains(text, "rank 1 has not called it");
  });
}

TEST_P(ScheduledTest, RankThatLeftFailsTheOthersByName) {
  const Shape shape = GetParam();
  std::vector<Call> calls(static_cast<size_t>(shape.size()));
  Ranks ranks(shape);
  ranks.run([&](int rank) {
    if (rank == 1) {
      ranks.group(rank).leave(seconds(5));
      return;
    }
    const std::string text = errorOf<PeerFailedError>([&] {
      Call& call = calls[static_cast<size_t>(rank)];
      call = allGather(ranks.group(rank), 100'000, 0);
      finish(ranks.engine(rank), *call.operation);
    });
    expectContains(text, "rank 1 has left group world");
  });
}

TEST_P(ScheduledTest, AbortEndsWaitsInTheMiddleOfLargeTransfers) {
  const Shape shape = GetParam();
  std::vector<Call> calls(static_cast<size_t>(shape.size()));
  Ranks ranks(shape);
  ranks.run([&](int rank) {
    Call& call = calls[static_cast<size_t>(rank)];
    try {
      call = allGather(ranks.group(rank), 20'000'000, 0);
      if (rank == 0) {
        ranks.group(rank).abort("test");
      }
      finish(ranks.engine(rank), *call.operation);
    } catch (const TransportError& error) {
      expectContains(error.what(), "rank 0 aborted group world: test");
    }
  });
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    ScheduledTest,
    ::testing::Values(
        Shape{{2}},
        Shape{{4}},
        Shape{{3}, false},
        Shape{{1, 1}},
        Shape{{2, 2}},
        Shape{{2, 1, 2}, false}),
    [](const auto& info) {
      std::string name;
      for (int ranks : info.param.ranksPerNode) {
        name += (name.empty() ? "" : "_") + std::to_string(ranks);
      }
      return name + (info.param.crossMemory ? "" : "_staged");
    });

}  // namespace
}  // namespace automoe::testing
