// SPDX-License-Identifier: Apache-2.0
// The send rows of the routes of one plan's parts: what packs them, and how
// they are summed again.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "process_group/known_routes.hpp"

namespace automoe {

using Routes = std::vector<std::shared_ptr<const KnownRoute>>;

/// Reads them anew. ValueError where they are not parts of one plan.
Routes readRoutes(const char* call, at::TensorList routes);
/// The same by KnownRoutes, for tensors of a device.
Routes findRoutes(const char* call, at::TensorList routes);

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
PartialTerms partialTerms(const Routes& routes);

}  // namespace automoe
