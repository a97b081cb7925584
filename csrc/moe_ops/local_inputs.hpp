// SPDX-License-Identifier: Apache-2.0
// The arguments of operators of one rank, checked the same for every device:
// that of the rows, where the others must be too.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "kernels/dtype.hpp"

namespace automoe {

/// Of scale_and_dot, with its outputs, which are not written yet.
struct ScaleAndDotInputs {
  kernels::DType dtype;
  int64_t count;
  at::Tensor grads;
  at::Tensor values;
  at::Tensor weights;  // of the sum's type; undefined: none
  at::Tensor index;
  at::Tensor scaled;
  at::Tensor dots;
};
ScaleAndDotInputs takeScaleAndDot(
    const at::Tensor& grads,
    const at::Tensor& values,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index);

/// Of unpermute; the values of the index are not looked at.
struct UnpermuteInputs {
  kernels::DType dtype;
  at::Tensor rows;
  at::Tensor weights;  // of the sum's type; undefined: none
  at::Tensor index;
  at::Tensor out;
};
UnpermuteInputs takeUnpermute(
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& index,
    int64_t numTokens,
    int64_t topK);

}  // namespace automoe
