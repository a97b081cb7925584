// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/route_parts.hpp"

#include "moe_ops/device_plans.hpp"
#include "moe_ops/tensors.hpp"

namespace automoe {

namespace {

std::shared_ptr<const KnownRoute> readKnown(const at::Tensor& words) {
  const at::Tensor all = routeWords(words);
  return std::make_shared<KnownRoute>(readRoute(int32sOf(all)));
}

template <typename Take>
Routes takeRoutes(const char* call, at::TensorList routes, const Take& take) {
  TORCH_CHECK_VALUE(
      !routes.empty(), call, ": routes is empty, expected at least one");
  Routes taken;
  for (const at::Tensor& route : routes) {
    taken.push_back(take(int32List(call, "routes", route)));
    const RouteFacts& first = taken.front()->facts;
    const RouteFacts& last = taken.back()->facts;
    TORCH_CHECK_VALUE(
        last.numTokens == first.numTokens &&
            taken.back()->nodeOfRank == taken.front()->nodeOfRank,
        call,
        ": routes[",
        taken.size() - 1,
        "] has ",
        last.numTokens,
        " tokens on rank ",
        last.rank,
        " of ",
        last.size,
        ", expected a part of the plan of routes[0], which has ",
        first.numTokens,
        " on rank ",
        first.rank,
        " of ",
        first.size);
  }
  return taken;
}

}  // namespace

Routes readRoutes(const char* call, at::TensorList routes) {
  return takeRoutes(call, routes, &readKnown);
}

Routes findRoutes(const char* call, at::TensorList routes) {
  return takeRoutes(call, routes, [](const at::Tensor& words) {
    auto known = KnownRoutes::instance().find(words);
    // What a device has planned has no send rows here.
    return known->onHost ? readKnown(words) : known;
  });
}

std::vector<at::Tensor> takePartials(
    const Routes& routes, at::TensorList partials, int64_t numTokens) {
  constexpr const char* kCall = "reduce_partials";
  TORCH_CHECK_VALUE(
      partials.size() == routes.size(),
      "reduce_partials: got ",
      partials.size(),
      " partials and ",
      routes.size(),
      " routes, expected as many");
  std::vector<at::Tensor> rows;
  for (size_t i = 0; i < partials.size(); ++i) {
    const RouteFacts& facts = routes[i]->facts;
    TORCH_CHECK_VALUE(
        facts.numTokens == numTokens && facts.sumsPerNode,
        "reduce_partials: routes[",
        i,
        "] has ",
        facts.numTokens,
        " tokens and ",
        facts.sumsPerNode ? "" : "no ",
        "sums of one node, expected num_tokens, ",
        numTokens,
        ", and sums of one node");
    rows.push_back(rowsOf(
        kCall,
        "partials",
        partials[i],
        facts.numSendRows,
        partials[0].device()));
    TORCH_CHECK_VALUE(
        rows[i].scalar_type() == rows[0].scalar_type() &&
            rows[i].sizes().slice(1) == rows[0].sizes().slice(1),
        "reduce_partials: partials[",
        i,
        "] is ",
        rows[i].scalar_type(),
        " of shape ",
        rows[i].sizes(),
        ", expected dtype and row shape of partials[0], ",
        rows[0].scalar_type(),
        " of shape ",
        rows[0].sizes());
  }
  return rows;
}

PartialTerms partialTerms(const Routes& routes) {
  const auto numTokens = static_cast<size_t>(routes.front()->facts.numTokens);
  const size_t numNodes = routes.front()->sendBegins.size() - 1;
  PartialTerms terms;
  terms.begins.assign(numTokens + 1, 0);
  for (const auto& route : routes) {
    for (const int32_t token : route->sendTokens) {
      terms.begins[static_cast<size_t>(token) + 1] += 1;
    }
  }
  for (size_t token = 0; token < numTokens; ++token) {
    terms.begins[token + 1] += terms.begins[token];
  }
  terms.parts.resize(static_cast<size_t>(terms.begins.back()));
  terms.rows.resize(terms.parts.size());
  std::vector<int32_t> next(terms.begins.begin(), terms.begins.end() - 1);
  for (size_t node = 0; node < numNodes; ++node) {
    for (size_t i = 0; i < routes.size(); ++i) {
      const size_t end = routes[i]->sendBegins[node + 1];
      for (size_t row = routes[i]->sendBegins[node]; row < end; ++row) {
        const auto token = static_cast<size_t>(routes[i]->sendTokens[row]);
        const auto place = static_cast<size_t>(next[token]);
        terms.parts[place] = static_cast<int32_t>(i);
        terms.rows[place] = static_cast<int32_t>(row);
        next[token] += 1;
      }
    }
  }
  return terms;
}

}  // namespace automoe
