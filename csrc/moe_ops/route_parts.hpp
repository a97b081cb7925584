// SPDX-License-Identifier: Apache-2.0
// The send rows of the routes of one plan's parts: what packs them, and how
// they are summed again.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "process_group/exchange/route.hpp"

namespace automoe {

/// Routes and the words that they look at.
struct Routes {
  std::vector<at::Tensor> words;
  std::vector<Route> views;
};

/// Checks that they are parts of one plan. ValueError else.
Routes takeRoutes(const char* call, at::TensorList routes);

/// The token of each send row.
std::vector<int32_t> sendTokens(const Route& route);

/// Checks the arguments of reduce_partials; returns dense partials on the
/// device of the first.
std::vector<at::Tensor> takePartials(
    const Routes& routes, at::TensorList partials, int64_t numTokens);

/// The terms of token t are [begins[t], begins[t + 1]), its nodes ascending:
/// row rows[i] of partial parts[i].
struct PartialTerms {
  std::vector<int32_t> begins;
  std::vector<int32_t> parts;
  std::vector<int32_t> rows;
};
PartialTerms partialTerms(const std::vector<Route>& routes);

}  // namespace automoe
