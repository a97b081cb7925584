// SPDX-License-Identifier: Apache-2.0
// Networks between devices that fail after they have taken a call: no method
// throws, and streams wait for what does not come.
#include <gtest/gtest.h>

#include "device_failures.hpp"
#include "device_plan_calls.hpp"

namespace automoe::testing {
namespace {

class DeviceNetworkFailure : public DeviceFailureTest {
 protected:
  static constexpr const char* kText = "transfer fails, as failCalls() asked";

  Routing routing() const {
    Routing routing = DeviceFailureTest::routing();
    routing.maxReceiveTokens = GetParam().bounded ? 9 : -1;
    return routing;
  }
};

TEST_P(DeviceNetworkFailure, IsNamedInADispatch) {
  std::vector<PlanResult> plans(static_cast<size_t>(size()));
  run([&](int rank) {
    plans[static_cast<size_t>(rank)] =
        makePlan(engine(rank), group(rank), routing());
  });
  run([&](int rank) {
    TwinCall call(exchange(rank), plans[static_cast<size_t>(rank)], {});
    if (rank == 2) {
      world().failCalls(rank, "transfer", 1);
    }
    const std::string text = heardOf([&] {
      call.enqueue(exchange(rank));
      for (const auto& made : call.calls) {
        finish(engine(rank), *made.operation);
      }
    });
    expectContains(text, kText);
    expectContains(text, "rank 2");
    expectThrough(rank, call.calls);
  });
}

TEST_P(DeviceNetworkFailure, IsNamedInAPlan) {
  run([&](int rank) {
    PlanCall call(exchange(rank), routing(), rank);
    if (rank == 2) {
      world().failCalls(rank, "transfer", 1);
    }
    const std::string text = heardOf([&] {
      const auto planned = call.make(exchange(rank));
      finish(engine(rank), *planned.call.operation);
    });
    expectContains(text, kText);
    expectContains(text, "rank 2");
  });
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    DeviceNetworkFailure,
    ::testing::ValuesIn(kPlanFailureCases),
    nameOfCase);

}  // namespace
}  // namespace automoe::testing
