// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_planner.hpp"

#include <algorithm>
#include <utility>
#include <vector>

#include "process_group/common/error.hpp"
#include "process_group/exchange/route_hash.hpp"
#include "process_group/exchange/scheduled.hpp"
#include "process_group/exchange/schedules.hpp"

namespace automoe {
namespace {

/// What every rank tells the others.
struct Facts {
  PlanFacts plan;
  int64_t align = 0;
  int64_t maxReceiveTokens = 0;
};

template <typename Of>
void checkSame(
    const std::vector<Facts>& facts, const char* name, const Of& of) {
  for (size_t rank = 1; rank < facts.size(); ++rank) {
    if (of(facts[rank]) != of(facts[0])) {
      throw InvalidArgument(concat(
          "plan: rank 0 has ",
          name,
          " ",
          of(facts[0]),
          ", rank ",
          rank,
          " has ",
          of(facts[rank]),
          "; all ranks of a plan on devices must pass the same"));
    }
  }
}

/// Places in lists have 32 bits.
void checkSizes(const AgreedPlan& agreed, const Facts& facts, int numNodes) {
  int64_t tokens = 0;
  int64_t most = 0;
  for (const PlanFacts& it : agreed.facts) {
    tokens += it.numTokens;
    most = std::max(most, it.numTokens);
  }
  const int64_t slots = std::max(tokens, most * numNodes);
  const int64_t padding = facts.plan.numExperts * facts.align;
  if (slots > (kMaxRouteLength - padding) / facts.plan.topK) {
    throw InvalidArgument(concat(
        "plan: ",
        tokens,
        " tokens of all ranks with ",
        facts.plan.topK,
        " experts each, and align ",
        facts.align,
        " for ",
        facts.plan.numExperts,
        " experts, expected at most ",
        kMaxRouteLength,
        " rows; plan fewer tokens at a time"));
  }
}

}  // namespace

DevicePlanner::DevicePlanner(
    Engine& engine,
    Group& group,
    std::shared_ptr<Device> device,
    std::shared_ptr<DeviceListPool> pool)
    : engine_(engine),
      group_(group),
      device_(std::move(device)),
      pool_(std::move(pool)),
      scratch_(*device_) {}

AgreedPlan DevicePlanner::agree(
    const DevicePlanArguments& arguments, std::chrono::milliseconds timeout) {
  // Shared with the engine, which may use them after a failure.
  const auto facts = std::make_shared<std::vector<Facts>>(
      static_cast<size_t>(group_.topology().size()));
  Facts& own = (*facts)[static_cast<size_t>(group_.topology().rank())];
  own.plan.numExperts = arguments.numExperts;
  own.plan.topK = arguments.topK;
  own.plan.numTokens = arguments.numTokens;
  own.align = arguments.align;
  own.maxReceiveTokens = arguments.maxReceiveTokens;
  std::vector<Block> blocks;
  for (Facts& it : *facts) {
    blocks.push_back({reinterpret_cast<std::byte*>(&it), sizeof(it)});
  }
  ScheduledArguments gather;
  gather.schedule = makeAllGather(
      group_.topology(),
      {reinterpret_cast<const std::byte*>(&own), sizeof(own)},
      blocks);
  gather.description.operation = OperationKind::kAllGather;
  gather.description.total = facts->size() * sizeof(Facts);
  OperationCallbacks callbacks;
  callbacks.released = [facts] {};
  const auto operation =
      group_.collective(std::move(gather), timeout, std::move(callbacks));
  engine_.wait(*operation, Engine::Clock::time_point::max());
  if (operation->error() != nullptr) {
    std::rethrow_exception(operation->error());
  }
  checkSame(*facts, "num_experts", [](auto& it) { return it.plan.numExperts; });
  checkSame(*facts, "topk", [](auto& it) { return it.plan.topK; });
  checkSame(*facts, "align", [](auto& it) { return it.align; });
  checkSame(
      *facts, "max_recv_tokens", [](auto& it) { return it.maxReceiveTokens; });
  AgreedPlan agreed;
  for (const Facts& it : *facts) {
    agreed.facts.push_back(it.plan);
  }
  agreed.turn = mixHash(fingerprintOf(agreed.facts), ++plans_);
  checkSizes(agreed, own, group_.topology().numNodes());
  return agreed;
}

void DevicePlanner::enqueue(
    const DeviceLane& lane,
    const DevicePlanArguments& arguments,
    const AgreedPlan& agreed,
    const DevicePlan::HostWait& wait,
    DeviceRoute& route) {
  DevicePlan plan(lane, *pool_, arguments, agreed);
  plan.gather();
  plan.count(scratch_);
  if (arguments.maxReceiveTokens < 0) {
    plan.readCounts(wait);
    plan.checkIds();
  }
  plan.list(route);
}

}  // namespace automoe
