// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels/reduce.hpp"
#include "kernels/rows.hpp"
#include "moe_ops/operators.hpp"
#include "moe_ops/tensors.hpp"

namespace automoe {
namespace {

/// Routes and the words that they look at.
struct Routes {
  std::vector<at::Tensor> words;
  std::vector<Route> views;
};

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

/// Groups of things, each in a list of its own: those of i are
/// [begins[i], begins[i + 1]).
struct Grouped {
  std::vector<size_t> begins;
  std::vector<const std::byte*> rows;

  std::span<const std::byte* const> of(size_t i) const {
    return std::span(rows).subspan(begins[i], begins[i + 1] - begins[i]);
  }
};

/// The partial rows of each token, its nodes ascending.
Grouped groupPartials(
    const std::vector<Route>& routes,
    const std::vector<at::Tensor>& partials,
    size_t numTokens) {
  Grouped grouped;
  grouped.begins.assign(numTokens + 1, 0);
  for (const Route& route : routes) {
    for (size_t row = 0; row < route.numSendRows(); ++row) {
      grouped.begins[static_cast<size_t>(route.sendToken(row)) + 1] += 1;
    }
  }
  for (size_t token = 0; token < numTokens; ++token) {
    grouped.begins[token + 1] += grouped.begins[token];
  }
  grouped.rows.resize(grouped.begins.back());
  std::vector<size_t> next(grouped.begins.begin(), grouped.begins.end() - 1);
  for (int node = 0; node < routes.front().numNodes(); ++node) {
    for (size_t i = 0; i < routes.size(); ++i) {
      const uint64_t bytes = rowBytes(partials[i]);
      const size_t end = routes[i].sendBegin(node + 1);
      for (size_t row = routes[i].sendBegin(node); row < end; ++row) {
        const auto token = static_cast<size_t>(routes[i].sendToken(row));
        grouped.rows[next[token]++] = bytesOf(partials[i]) + row * bytes;
      }
    }
  }
  return grouped;
}

}  // namespace

PlanTensors planPart(
    const at::Tensor& route,
    const at::Tensor& offsets,
    int64_t part,
    int64_t numParts) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(
      numParts >= 1 && numParts <= kMost && part >= 0 && part < numParts,
      "plan_part: part is ",
      part,
      " of num_parts ",
      numParts,
      ", expected 0 <= part < num_parts");
  const at::Tensor words = int32List("plan_part", "route", route);
  const at::Tensor ends = int32List("plan_part", "offsets", offsets);
  return withTorchErrors([&] {
    return toTensors(partOfRoute(
        Route(int32sOf(words)),
        int32sOf(ends),
        static_cast<int>(part),
        static_cast<int>(numParts)));
  });
}

at::Tensor routeFacts(const at::Tensor& route) {
  const at::Tensor words = int32List("route_facts", "route", route);
  return withTorchErrors([&] {
    const Route view(int32sOf(words));
    const int64_t facts[] = {
        static_cast<int64_t>(view.fingerprint()),
        view.numTokens(),
        view.totalTokens(),
        view.topK(),
        view.numExperts(),
        view.align(),
        view.numReceiveRows(),
        view.numDropped(),
        static_cast<int64_t>(view.numSendRows()),
        static_cast<int64_t>(view.numLandRows()),
        view.rank(),
        view.size(),
        view.numNodes(),
        view.node(),
        view.sumsPerNode() ? 1 : 0,
        0};
    at::Tensor tensor = emptyList(std::ssize(facts), at::kLong);
    std::memcpy(mutableBytesOf(tensor), facts, sizeof(facts));
    return tensor;
  });
}

at::Tensor routeReductionMap(const at::Tensor& route) {
  const at::Tensor words = int32List("route_reduction_map", "route", route);
  return withTorchErrors(
      [&] { return toTensor(Route(int32sOf(words)).reductionMap()); });
}

std::vector<at::Tensor> packRows(const at::Tensor& x, at::TensorList routes) {
  return withTorchErrors([&] {
    const Routes taken = takeRoutes("pack_rows", routes);
    const at::Tensor rows =
        rowsOf("pack_rows", "x", x, taken.views.front().numTokens());
    std::vector<at::Tensor> packed;
    for (const Route& route : taken.views) {
      const std::vector<int32_t> tokens = sendTokens(route);
      packed.push_back(emptyRows(rows, std::ssize(tokens)));
      kernels::gatherRows(
          mutableBytesOf(packed.back()), bytesOf(rows), tokens, rowBytes(rows));
    }
    return packed;
  });
}

at::Tensor reducePartials(
    at::TensorList partials, at::TensorList routes, int64_t numTokens) {
  constexpr const char* kCall = "reduce_partials";
  TORCH_CHECK_VALUE(
      partials.size() == routes.size(),
      "reduce_partials: got ",
      partials.size(),
      " partials and ",
      routes.size(),
      " routes, expected as many");
  return withTorchErrors([&] {
    const Routes taken = takeRoutes(kCall, routes);
    std::vector<at::Tensor> rows;
    for (size_t i = 0; i < partials.size(); ++i) {
      const Route& route = taken.views[i];
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
          static_cast<int64_t>(route.numSendRows())));
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
    const kernels::DType dtype = dtypeOf(kCall, "partials", rows[0]);
    const auto count = static_cast<size_t>(numTokens);
    const Grouped grouped = groupPartials(taken.views, rows, count);
    at::Tensor out = emptyRows(rows[0], numTokens);
    for (size_t token = 0; token < count; ++token) {
      const auto terms = grouped.of(token);
      const auto end = static_cast<uint32_t>(terms.size());
      kernels::reduceRow(
          dtype,
          mutableBytesOf(out) + token * rowBytes(out),
          terms,
          nullptr,
          std::span(&end, 1),
          rowElements(out));
    }
    return out;
  });
}

}  // namespace automoe
