// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels/reduce.hpp"
#include "kernels/rows.hpp"
#include "moe_ops/operators.hpp"
#include "moe_ops/route_parts.hpp"
#include "moe_ops/tensors.hpp"

namespace automoe {

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
    const auto span = int32sOf(words);
    int64_t node = 0;
    bool sumsPerNode = true;
    if (isRouteOnDevice(span)) {
      const auto known = KnownRoutes::instance().find(words);
      node = known->nodeOfRank[static_cast<size_t>(known->facts.rank)];
    } else {
      const Route view(span);
      node = view.node();
      sumsPerNode = view.sumsPerNode();
    }
    const RouteHeader header = readRouteHeader(span);
    const int64_t facts[] = {
        static_cast<int64_t>(header.fingerprint),
        header.numTokens,
        header.totalTokens,
        header.topK,
        header.numExperts,
        header.align,
        header.numReceiveRows,
        header.numDropped,
        header.numSendRows,
        header.numLandRows,
        header.rank,
        header.size,
        header.numNodes,
        node,
        sumsPerNode ? 1 : 0,
        0};
    at::Tensor tensor = emptyList(std::ssize(facts), at::kLong);
    std::memcpy(mutableBytesOf(tensor), facts, sizeof(facts));
    return tensor;
  });
}

at::Tensor routeReductionMap(const at::Tensor& route) {
  const at::Tensor words = int32List("route_reduction_map", "route", route);
  return withTorchErrors([&] {
    const auto span = int32sOf(words);
    return isRouteOnDevice(span)
               ? toTensor(KnownRoutes::instance().find(words)->nodeOfRank)
               : toTensor(Route(span).reductionMap());
  });
}

std::vector<at::Tensor> packRows(const at::Tensor& x, at::TensorList routes) {
  return withTorchErrors([&] {
    const Routes taken = readRoutes("pack_rows", routes);
    const at::Tensor rows =
        rowsOf("pack_rows", "x", x, taken.front()->facts.numTokens);
    std::vector<at::Tensor> packed;
    for (const auto& route : taken) {
      packed.push_back(emptyRows(rows, route->facts.numSendRows));
      kernels::gatherRows(
          mutableBytesOf(packed.back()),
          bytesOf(rows),
          route->sendTokens,
          rowBytes(rows));
    }
    return packed;
  });
}

at::Tensor reducePartials(
    at::TensorList partials, at::TensorList routes, int64_t numTokens) {
  constexpr const char* kCall = "reduce_partials";
  return withTorchErrors([&] {
    const Routes taken = readRoutes(kCall, routes);
    const std::vector<at::Tensor> rows =
        takePartials(taken, partials, numTokens);
    const kernels::DType dtype = dtypeOf(kCall, "partials", rows[0]);
    const auto count = static_cast<size_t>(numTokens);
    const PartialTerms terms = partialTerms(taken);
    at::Tensor out = emptyRows(rows[0], numTokens);
    std::vector<const std::byte*> of;
    for (size_t token = 0; token < count; ++token) {
      const auto begin = static_cast<size_t>(terms.begins[token]);
      const auto end = static_cast<size_t>(terms.begins[token + 1]);
      of.clear();
      for (size_t term = begin; term < end; ++term) {
        of.push_back(
            bytesOf(rows[static_cast<size_t>(terms.parts[term])]) +
            static_cast<size_t>(terms.rows[term]) * rowBytes(out));
      }
      const auto number = static_cast<uint32_t>(of.size());
      kernels::reduceRow(
          dtype,
          mutableBytesOf(out) + token * rowBytes(out),
          of,
          nullptr,
          std::span(&number, 1),
          rowElements(out));
    }
    return out;
  });
}

}  // namespace automoe
