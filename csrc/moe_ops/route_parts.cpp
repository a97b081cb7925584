// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/route_parts.hpp"

#include <algorithm>

#include "moe_ops/tensors.hpp"

namespace automoe {

Routes takeRoutes(const char* call, at::TensorList routes) {
  TORCH_CHECK_VALUE(
      !routes.empty(), call, ": routes is empty, expected at least one");
  Routes taken;
  for (const at::Tensor& route : routes) {
    taken.words.push_back(int32List(call, "routes", route));
    taken.views.emplace_back(int32sOf(taken.words.back()));
    const Route& first = taken.views.front();
    const Route& last = taken.views.back();
    TORCH_CHECK_VALUE(
        last.numTokens() == first.numTokens() &&
            std::ranges::equal(last.nodeOfRank(), first.nodeOfRank()),
        call,
        ": routes[",
        taken.views.size() - 1,
        "] has ",
        last.numTokens(),
        " tokens on rank ",
        last.rank(),
        " of ",
        last.size(),
        ", expected a part of the plan of routes[0], which has ",
        first.numTokens(),
        " on rank ",
        first.rank(),
        " of ",
        first.size());
  }
  return taken;
}

std::vector<int32_t> sendTokens(const Route& route) {
  std::vector<int32_t> tokens(route.numSendRows());
  for (size_t row = 0; row < tokens.size(); ++row) {
    tokens[row] = route.sendToken(row);
  }
  return tokens;
}

std::vector<at::Tensor> takePartials(
    const Routes& routes, at::TensorList partials, int64_t numTokens) {
  constexpr const char* kCall = "reduce_partials";
  TORCH_CHECK_VALUE(
      partials.size() == routes.views.size(),
      "reduce_partials: got ",
      partials.size(),
      " partials and ",
      routes.views.size(),
      " routes, expected as many");
  std::vector<at::Tensor> rows;
  for (size_t i = 0; i < partials.size(); ++i) {
    const Route& route = routes.views[i];
    TORCH_CHECK_VALUE(
        route.numTokens() == numTokens && route.sumsPerNode(),
        "reduce_partials: routes[",
        i,
        "] has ",
        route.numTokens(),
        " tokens and ",
        route.sumsPerNode() ? "" : "no ",
        "sums of one node, expected num_tokens, ",
        numTokens,
        ", and sums of one node");
    rows.push_back(rowsOf(
        kCall,
        "partials",
        partials[i],
        static_cast<int64_t>(route.numSendRows()),
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

PartialTerms partialTerms(const std::vector<Route>& routes) {
  const auto numTokens = static_cast<size_t>(routes.front().numTokens());
  PartialTerms terms;
  terms.begins.assign(numTokens + 1, 0);
  for (const Route& route : routes) {
    for (size_t row = 0; row < route.numSendRows(); ++row) {
      terms.begins[static_cast<size_t>(route.sendToken(row)) + 1] += 1;
    }
  }
  for (size_t token = 0; token < numTokens; ++token) {
    terms.begins[token + 1] += terms.begins[token];
  }
  terms.parts.resize(static_cast<size_t>(terms.begins.back()));
  terms.rows.resize(terms.parts.size());
  std::vector<int32_t> next(terms.begins.begin(), terms.begins.end() - 1);
  for (int node = 0; node < routes.front().numNodes(); ++node) {
    for (size_t i = 0; i < routes.size(); ++i) {
      const size_t end = routes[i].sendBegin(node + 1);
      for (size_t row = routes[i].sendBegin(node); row < end; ++row) {
        int32_t& place = next[static_cast<size_t>(routes[i].sendToken(row))];
        terms.parts[static_cast<size_t>(place)] = static_cast<int32_t>(i);
        terms.rows[static_cast<size_t>(place)] = static_cast<int32_t>(row);
        place += 1;
      }
    }
  }
  return terms;
}

}  // namespace automoe
