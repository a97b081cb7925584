// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/dispatch.hpp"

#include <gtest/gtest.h>

#include "moe_calls.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

std::vector<int32_t> nodesOf(const Topology& topology) {
  std::vector<int32_t> nodes;
  for (int rank = 0; rank < topology.size(); ++rank) {
    nodes.push_back(topology.nodeOf(rank));
  }
  return nodes;
}

/// Plan, dispatch, combine, and a look at every value.
void thereAndBack(
    Ranks& ranks, const Routing& routing, size_t h, bool weighted) {
  ranks.run([&](int rank) {
    Group& group = ranks.group(rank);
    Engine& engine = ranks.engine(rank);
    const PlanResult plan = makePlan(engine, group, routing);
    MoeCall call(routing, plan, rank, h);
    finish(engine, *group.dispatch(call.dispatchArguments(), seconds(30), {}));
    call.expectDispatched();
    finish(
        engine,
        *group.combine(call.combineArguments(weighted), seconds(30), {}));
    call.expectCombined(
        routing.reductionMap.empty() ? nodesOf(group.topology())
                                     : routing.reductionMap,
        weighted);
  });
}

class DispatchTest : public ::testing::TestWithParam<Shape> {};

TEST_P(DispatchTest, ThereAndBack) {
  Ranks ranks(GetParam());
  const int size = ranks.size();
  unsigned seed = 1;
  for (int64_t topK : {1, 3, 8}) {
    for (int64_t experts : {int64_t{1}, int64_t{size}, int64_t{3 * size + 1}}) {
      for (size_t h : {1U, 5U, 700U}) {
        thereAndBack(
            ranks,
            randomRouting(size, experts, topK, 20, seed),
            h,
            seed % 2 == 0);
        seed += 1;
      }
    }
  }
}

TEST_P(DispatchTest, LargeEnoughForChunks) {
  Ranks ranks(GetParam());
  thereAndBack(ranks, randomRouting(ranks.size(), 16, 4, 400, 5), 1024, true);
  // A row that no chunk holds.
  thereAndBack(ranks, randomRouting(ranks.size(), 4, 2, 8, 6), 40000, true);
}

TEST_P(DispatchTest, Nothing) {
  Ranks ranks(GetParam());
  Routing routing = randomRouting(ranks.size(), 4, 2, 0, 6);
  thereAndBack(ranks, routing, 16, true);
  for (auto& ids : routing.ids) {
    ids.assign(10, -1);
  }
  thereAndBack(ranks, routing, 16, true);
}

TEST_P(DispatchTest, PaddedAndPinned) {
  Ranks ranks(GetParam());
  const int size = ranks.size();
  Routing routing = randomRouting(size, 2 * size, 4, 30, 8);
  routing.align = 16;
  thereAndBack(ranks, routing, 33, true);
  // Another cluster's order of sums: two groups of interleaved ranks.
  for (int rank = 0; rank < size; ++rank) {
    routing.reductionMap.push_back(size == 1 ? 0 : rank % 2);
  }
  thereAndBack(ranks, routing, 33, true);
  thereAndBack(ranks, randomRouting(size, 2 * size, 4, 300, 8), 600, false);
}

TEST_P(DispatchTest, SeveralPlansInAnyOrder) {
  Ranks ranks(GetParam());
  const int size = ranks.size();
  const std::vector<Routing> routings = {
      randomRouting(size, 8, 2, 40, 1),
      randomRouting(size, 5, 3, 9, 2),
      randomRouting(size, 16, 4, 100, 3)};
  ranks.run([&](int rank) {
    Group& group = ranks.group(rank);
    std::vector<std::shared_ptr<RouteBuilder>> builders;
    std::vector<std::shared_ptr<Operation>> plansPosted;
    for (const Routing& routing : routings) {
      builders.push_back(startPlan(group, routing));
      plansPosted.push_back(group.plan(builders.back(), seconds(30), {}));
    }
    std::vector<PlanResult> plans;
    for (size_t i = 0; i < routings.size(); ++i) {
      finish(ranks.engine(rank), *plansPosted[i]);
      plans.push_back(builders[i]->finish());
    }
    std::vector<MoeCall> calls;
    for (size_t i = 0; i < routings.size(); ++i) {
      calls.emplace_back(routings[i], plans[i], rank, 100 + i);
    }
    for (int round = 0; round < 20; ++round) {
      std::vector<std::shared_ptr<Operation>> posted;
      for (size_t i : {2U, 0U, 1U}) {
        posted.push_back(
            group.dispatch(calls[i].dispatchArguments(), seconds(30), {}));
      }
      for (const auto& operation : posted) {
        finish(ranks.engine(rank), *operation);
      }
      posted.clear();
      for (size_t i : {1U, 2U, 0U}) {
        calls[i].expectDispatched();
        posted.push_back(
            group.combine(calls[i].combineArguments(true), seconds(30), {}));
      }
      for (const auto& operation : posted) {
        finish(ranks.engine(rank), *operation);
      }
      for (const MoeCall& call : calls) {
        call.expectCombined(nodesOf(group.topology()), true);
      }
    }
  });
}

TEST_P(DispatchTest, ALateRankKeepsNobodysBytes) {
  Ranks ranks(GetParam());
  const Routing routing = randomRouting(ranks.size(), 8, 4, 60, 11);
  ranks.run([&](int rank) {
    Group& group = ranks.group(rank);
    Engine& engine = ranks.engine(rank);
    const PlanResult plan = makePlan(engine, group, routing);
    for (int round = 0; round < 3; ++round) {
      MoeCall call(routing, plan, rank, 3000);
      if (rank == 0) {
        std::this_thread::sleep_for(milliseconds(30));
      }
      finish(
          engine, *group.dispatch(call.dispatchArguments(), seconds(30), {}));
      call.expectDispatched();
      if (rank == ranks.size() - 1) {
        std::this_thread::sleep_for(milliseconds(30));
      }
      finish(
          engine, *group.combine(call.combineArguments(true), seconds(30), {}));
      call.expectCombined(nodesOf(group.topology()), true);
    }
  });
}

TEST_P(DispatchTest, AVeryLateNodeMateOfASmallCombine) {
  // What the others of its node have to say does not wait for it.
  Ranks ranks(GetParam());
  const Routing routing = randomRouting(ranks.size(), 8, 2, 10, 12);
  ranks.run([&](int rank) {
    Group& group = ranks.group(rank);
    Engine& engine = ranks.engine(rank);
    const PlanResult plan = makePlan(engine, group, routing);
    MoeCall call(routing, plan, rank, 8);
    finish(engine, *group.dispatch(call.dispatchArguments(), seconds(30), {}));
    if (rank == ranks.size() - 1) {
      std::this_thread::sleep_for(milliseconds(1200));
    }
    finish(
        engine, *group.combine(call.combineArguments(true), seconds(30), {}));
    call.expectCombined(nodesOf(group.topology()), true);
  });
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    DispatchTest,
    ::testing::Values(
        Shape{{1}},
        Shape{{3}},
        Shape{{1, 1}},
        Shape{{2, 2}},
        Shape{{3, 3, 2}},
        Shape{{1, 3}}),
    [](const auto& info) {
      std::string name = "Nodes";
      for (int ranks : info.param.ranksPerNode) {
        name += concat("_", ranks);
      }
      return name;
    });

// ---- what does not fit together ----

class MismatchTest : public ::testing::Test {
 protected:
  MismatchTest() : ranks_(Shape{{2, 1}}) {}

  /// The text that every rank's call ends with.
  template <typename Call>
  void expectOnAllRanks(const std::string& text, const Call& call) {
    ranks_.run([&](int rank) {
      expectContains(errorOf<InvalidArgument>([&] { call(rank); }), text);
    });
  }
  void plan(int rank, const Routing& routing) {
    (void)makePlan(ranks_.engine(rank), ranks_.group(rank), routing);
  }

  Ranks ranks_;
  Routing routing_ = randomRouting(3, 6, 2, 10, 3);
};

TEST_F(MismatchTest, ExpertsOfPlan) {
  expectOnAllRanks("num_experts", [&](int rank) {
    Routing routing = routing_;
    routing.numExperts += rank == 2 ? 6 : 0;
    plan(rank, routing);
  });
}

TEST_F(MismatchTest, AnotherCollective) {
  const PlanResult unused;
  expectOnAllRanks("is plan on rank", [&](int rank) {
    if (rank == 2) {
      finish(ranks_.engine(rank), post(ranks_.group(rank), equalSizes(3, 10)));
    } else {
      plan(rank, routing_);
    }
  });
}

TEST_F(MismatchTest, RowBytes) {
  expectOnAllRanks("bytes in a row: 40, rank 2 has 44", [&](int rank) {
    const PlanResult made =
        makePlan(ranks_.engine(rank), ranks_.group(rank), routing_);
    MoeCall call(routing_, made, rank, rank == 2 ? 11 : 10);
    finish(
        ranks_.engine(rank),
        *ranks_.group(rank).dispatch(
            call.dispatchArguments(), seconds(30), {}));
  });
}

TEST_F(MismatchTest, TypesOfLaterTensors) {
  expectOnAllRanks("tensors of types and sizes", [&](int rank) {
    const PlanResult made =
        makePlan(ranks_.engine(rank), ranks_.group(rank), routing_);
    MoeCall call(routing_, made, rank, 10);
    DispatchArguments arguments = call.dispatchArguments();
    // One tensor of 40 bytes a row, or two of 20.
    if (rank == 1) {
      arguments.fields[0].rowBytes = 20;
      arguments.fields.push_back(arguments.fields[0]);
    }
    finish(
        ranks_.engine(rank),
        *ranks_.group(rank).dispatch(arguments, seconds(30), {}));
  });
}

TEST_F(MismatchTest, PlanOfDispatch) {
  expectOnAllRanks("has plan ", [&](int rank) {
    const PlanResult first =
        makePlan(ranks_.engine(rank), ranks_.group(rank), routing_);
    Routing other = routing_;
    other.ids[0][0] = (other.ids[0][0] + 1) % 6;
    const PlanResult second =
        makePlan(ranks_.engine(rank), ranks_.group(rank), other);
    MoeCall call(
        rank == 2 ? other : routing_, rank == 2 ? second : first, rank, 10);
    finish(
        ranks_.engine(rank),
        *ranks_.group(rank).dispatch(
            call.dispatchArguments(), seconds(30), {}));
  });
}

TEST_F(MismatchTest, WeightsOfCombine) {
  expectOnAllRanks("bytes in a weight: ", [&](int rank) {
    const PlanResult made =
        makePlan(ranks_.engine(rank), ranks_.group(rank), routing_);
    MoeCall call(routing_, made, rank, 10);
    finish(
        ranks_.engine(rank),
        *ranks_.group(rank).dispatch(
            call.dispatchArguments(), seconds(30), {}));
    finish(
        ranks_.engine(rank),
        *ranks_.group(rank).combine(
            call.combineArguments(rank != 0), seconds(30), {}));
  });
}

TEST_F(MismatchTest, ScalarsOfCombine) {
  expectOnAllRanks("bytes of scalars beside a row: ", [&](int rank) {
    const PlanResult made =
        makePlan(ranks_.engine(rank), ranks_.group(rank), routing_);
    MoeCall call(routing_, made, rank, 10);
    CombineArguments arguments = call.combineArguments(true);
    arguments.withScalars = rank != 2;
    finish(
        ranks_.engine(rank),
        *ranks_.group(rank).combine(arguments, seconds(30), {}));
  });
}

TEST_F(MismatchTest, AnArgumentThatOneRankRefuses) {
  expectOnAllRanks("topk_ids", [&](int rank) {
    if (rank == 1) {
      ranks_.group(rank).refuse("topk_ids[0][0] is 77");
      throw InvalidArgument("topk_ids");
    }
    plan(rank, routing_);
  });
  ranks_.run([&](int rank) {
    expectContains(
        errorOf<InvalidArgument>([&] { plan(rank, routing_); }),
        "topk_ids[0][0] is 77");
  });
}

TEST_F(MismatchTest, WhatAllRefuseHasNotHappened) {
  ranks_.run([&](int rank) {
    for (int round = 0; round < 20; ++round) {
      ranks_.group(rank).refuse("no");
      plan(rank, routing_);
    }
  });
}

TEST_F(MismatchTest, RefusedByOneThatIsLate) {
  expectOnAllRanks("not that", [&](int rank) {
    if (rank == 0) {
      std::this_thread::sleep_for(milliseconds(50));
      ranks_.group(rank).refuse("not that");
    }
    plan(rank, routing_);
  });
}

TEST_F(MismatchTest, RefusedByOneThatIsEarly) {
  expectOnAllRanks("not that", [&](int rank) {
    if (rank == 2) {
      ranks_.group(rank).refuse("not that");
    } else {
      std::this_thread::sleep_for(milliseconds(50));
    }
    plan(rank, routing_);
  });
}

}  // namespace
}  // namespace automoe::testing
