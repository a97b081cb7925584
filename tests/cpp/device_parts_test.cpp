// SPDX-License-Identifier: Apache-2.0
// Parts of a plan, dispatched and combined on devices one by one as moe() with
// num_chunks does it: each against the CPU, and all together against the whole.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "device_ranks.hpp"
#include "process_group/common/error.hpp"

namespace automoe::testing {
namespace {

/// A plan, and what it is cut into, of one rank.
struct Parts {
  Parts(DeviceRanks& ranks, int rank, const Routing& routing, int count)
      : whole(makePlan(ranks.engine(rank), ranks.group(rank), routing)),
        route(whole.route) {
    for (int part = 0; part < count; ++part) {
      parts.push_back(partOfRoute(route, whole.offsets, part, count));
    }
  }

  /// The send rows of the whole that are those of a part, in its order: pieces
  /// of one node follow each other in the order of the parts.
  std::vector<std::vector<size_t>> rowsOfParts() const {
    std::vector<std::vector<size_t>> rows(parts.size());
    for (int node = 0; node < route.numNodes(); ++node) {
      size_t next = route.sendBegin(node);
      for (size_t i = 0; i < parts.size(); ++i) {
        const Route part(parts[i].route);
        const size_t count = part.sendBegin(node + 1) - part.sendBegin(node);
        for (size_t row = 0; row < count; ++row) {
          rows[i].push_back(next++);
        }
      }
      EXPECT_EQ(next, route.sendBegin(node + 1));
    }
    return rows;
  }

  const PlanResult whole;
  const Route route;
  std::vector<PlanResult> parts;
};

struct PartsCase {
  Routing routing;
  int count = 1;
  DeviceCase it = {};
};

/// Enqueues all parts of all cases before the host looks at any result.
void partByPart(DeviceRanks& ranks, const std::vector<PartsCase>& cases) {
  ranks.run([&](int rank) {
    DeviceExchange& exchange = ranks.exchange(rank);
    std::vector<std::unique_ptr<TwinCall>> calls;
    for (const PartsCase& each : cases) {
      const Parts made(ranks, rank, each.routing, each.count);
      for (const PlanResult& part : made.parts) {
        calls.push_back(std::make_unique<TwinCall>(exchange, part, each.it));
        calls.back()->runOnCpu(ranks.engine(rank), ranks.group(rank));
      }
    }
    enqueueAndCompare(ranks, rank, calls);
  });
}

class DevicePartsTest : public ::testing::TestWithParam<Shape> {};

TEST_P(DevicePartsTest, EachIsThatOfTheHost) {
  DeviceRanks ranks(GetParam(), 1);
  const int size = ranks.size();
  std::vector<PartsCase> cases;
  unsigned seed = 1;
  for (const auto dtype :
       {kernels::DType::kBFloat16,
        kernels::DType::kFloat32,
        kernels::DType::kFloat16,
        kernels::DType::kFloat64}) {
    PartsCase it{randomRouting(size, 2 * size + 1, 3, 7, seed)};
    it.routing.align = seed % 2 == 0 ? 4 : 1;
    it.count = static_cast<int>(seed);
    it.it = {
        .dtype = dtype,
        .elements = seed % 3 == 0 ? 24U : 7U,
        .weighted = seed % 2 == 0,
        .withScalars = seed != 3,
        .packed = seed != 2,
        .seed = seed};
    cases.push_back(it);
    seed += 1;
  }
  partByPart(ranks, cases);
  ranks.expectNoErrors();
}

TEST_P(DevicePartsTest, OfABoundedPlan) {
  DeviceRanks ranks(GetParam(), 2);
  const int size = ranks.size();
  std::vector<PartsCase> cases;
  for (const int64_t bound : {0, 5, 200}) {
    PartsCase it{randomRouting(size, 2 * size, 2, 6, 4), 3, {.packed = true}};
    it.routing.maxReceiveTokens = bound;
    cases.push_back(it);
  }
  partByPart(ranks, cases);
  ranks.expectNoErrors();
}

TEST_P(DevicePartsTest, MoreThanThereAreRows) {
  DeviceRanks ranks(GetParam(), 3);
  const int size = ranks.size();
  Routing unrouted = randomRouting(size, 4, 2, 3, 6);
  for (auto& ids : unrouted.ids) {
    std::ranges::fill(ids, -1);
  }
  partByPart(
      ranks,
      {{randomRouting(size, 2 * size, 2, 1, 5), 6, {.packed = true}},
       {randomRouting(size, 4, 2, 0, 6), 2, {.packed = true}},
       {unrouted, 2, {.packed = true}}});
  ranks.expectNoErrors();
}

/// Rows as they are packed for the parts, and the sums that each part gives.
TEST_P(DevicePartsTest, TogetherTheyAreTheWhole) {
  for (unsigned seed = 4; seed < 7; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    DeviceRanks ranks(GetParam(), seed);
    const int size = ranks.size();
    const Routing routing = randomRouting(size, 2 * size, 4, 9, seed);
    ranks.run([&](int rank) {
      const Parts made(ranks, rank, routing, static_cast<int>(seed) - 2);
      const auto rows = made.rowsOfParts();
      const DeviceCase it{.packed = true, .seed = seed};
      std::vector<std::unique_ptr<TwinCall>> calls;
      calls.push_back(
          std::make_unique<TwinCall>(ranks.exchange(rank), made.whole, it));
      for (size_t i = 0; i < rows.size(); ++i) {
        calls.push_back(std::make_unique<TwinCall>(
            ranks.exchange(rank), made.parts[i], it));
        calls.back()->takeInputs(*calls.front(), rows[i]);
      }
      for (const auto& call : calls) {
        call->runOnCpu(ranks.engine(rank), ranks.group(rank));
        call->enqueue(ranks.exchange(rank));
      }
      for (const auto& call : calls) {
        call->expectSame();
      }
      for (size_t i = 0; i < rows.size(); ++i) {
        for (size_t row = 0; row < rows[i].size(); ++row) {
          EXPECT_TRUE(std::ranges::equal(
              calls[i + 1]->combined(row),
              calls.front()->combined(rows[i][row])))
              << "row " << row << " of part " << i << ", rank " << rank;
        }
      }
    });
    ranks.expectNoErrors();
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    DevicePartsTest,
    ::testing::Values(
        Shape{{1}},
        Shape{{3}},
        Shape{{2, 2}},
        Shape{{3, 1, 2}},
        Shape{{2, 2, 2, 2}}));

TEST(DeviceParts, AnotherPartIsNamed) {
  DeviceRanks ranks(Shape{{2, 2, 2, 2}}, 9);
  const Routing routing = randomRouting(8, 16, 2, 6, 1);
  std::vector<PlanResult> parts(8);
  ranks.run([&](int rank) {
    const Parts made(ranks, rank, routing, 3);
    parts[static_cast<size_t>(rank)] = made.parts[rank == 5 ? 2 : 1];
  });
  ranks.run([&](int rank) {
    TwinCall call(
        ranks.exchange(rank),
        parts[static_cast<size_t>(rank)],
        {.packed = true});
    std::string text = "no error";
    try {
      call.enqueue(ranks.exchange(rank));
      for (const auto& each : call.calls) {
        finish(ranks.engine(rank), *each.operation);
      }
    } catch (const Error& error) {
      text = error.what();
    }
    expectContains(text, "rank 5");
    expectContains(text, " has plan ");
    expectContains(text, "they must agree");
  });
}

}  // namespace
}  // namespace automoe::testing
