// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/plan_arguments.hpp"

#include <algorithm>

#include "process_group/common/error.hpp"
#include "process_group/exchange/route_hash.hpp"
#include "process_group/exchange/route_words.hpp"

namespace automoe {
namespace {

void checkWithin(const char* name, int64_t got, int64_t least) {
  if (got < least || got > kMaxRouteLength) {
    throw InvalidArgument(concat(
        "plan: ",
        name,
        " is ",
        got,
        ", expected ",
        least,
        " to ",
        kMaxRouteLength));
  }
}

}  // namespace

void checkPlanSizes(const PlanArguments& arguments) {
  const int64_t numTokens = arguments.numTokens;
  const int64_t topK = arguments.topK;
  checkWithin("the number of tokens of topk_ids", numTokens, 0);
  checkWithin("the number of experts per token of topk_ids", topK, 1);
  checkWithin("num_experts", arguments.numExperts, 1);
  checkWithin("align", arguments.align, 1);
  if (arguments.maxReceiveTokens != -1) {
    checkWithin("max_recv_tokens", arguments.maxReceiveTokens, 0);
  }
  // Both are below 2^31 here.
  if (numTokens * topK > kMaxRouteLength) {
    throw InvalidArgument(concat(
        "plan: topk_ids of shape (",
        numTokens,
        ", ",
        topK,
        ") has ",
        numTokens * topK,
        " items, expected at most ",
        kMaxRouteLength));
  }
}

void checkPlanArguments(const PlanArguments& arguments) {
  checkPlanSizes(arguments);
  const int64_t numTokens = arguments.numTokens;
  const int64_t topK = arguments.topK;
  if (static_cast<int64_t>(arguments.topkIds.size()) != numTokens * topK) {
    throw InvalidArgument(concat(
        "plan: topk_ids has ",
        arguments.topkIds.size(),
        " items, expected ",
        numTokens * topK,
        " for ",
        numTokens,
        " tokens of ",
        topK));
  }
}

std::vector<int32_t> canonicalReductionMap(
    std::span<const int32_t> labels, std::span<const int32_t> nodeOfRank) {
  if (labels.empty()) {
    return {nodeOfRank.begin(), nodeOfRank.end()};
  }
  if (labels.size() != nodeOfRank.size()) {
    throw InvalidArgument(concat(
        "plan: reduction_map has ",
        labels.size(),
        " labels, expected one for each of ",
        nodeOfRank.size(),
        " ranks"));
  }
  const auto wrong =
      std::ranges::find_if(labels, [](int32_t label) { return label < 0; });
  if (wrong != labels.end()) {
    throw InvalidArgument(concat(
        "plan: reduction_map[",
        wrong - labels.begin(),
        "] is ",
        *wrong,
        ", expected a label of at least 0"));
  }
  std::vector<int32_t> values(labels.begin(), labels.end());
  std::ranges::sort(values);
  values.erase(std::unique(values.begin(), values.end()), values.end());
  std::vector<int32_t> map;
  map.reserve(labels.size());
  for (const int32_t label : labels) {
    map.push_back(static_cast<int32_t>(
        std::ranges::lower_bound(values, label) - values.begin()));
  }
  return map;
}

uint64_t hashReductionMap(
    std::span<const int32_t> map, std::span<const int32_t> nodeOfRank) {
  if (std::ranges::equal(map, nodeOfRank)) {
    return 0;
  }
  uint64_t hash = kHashSeed;
  for (const int32_t label : map) {
    hash = mixHash(hash, static_cast<uint64_t>(label));
  }
  return std::max<uint64_t>(hash, 1);  // 0 is the topology's
}

}  // namespace automoe
