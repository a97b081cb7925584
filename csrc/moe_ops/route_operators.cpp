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
  return withTorchErrors([&] {
    const Routes taken = takeRoutes(kCall, routes);
    const std::vector<at::Tensor> rows =
        takePartials(taken, partials, numTokens);
    const kernels::DType dtype = dtypeOf(kCall, "partials", rows[0]);
    const auto count = static_cast<size_t>(numTokens);
    const PartialTerms terms = partialTerms(taken.views);
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
