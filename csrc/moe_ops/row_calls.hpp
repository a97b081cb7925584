// SPDX-License-Identifier: Apache-2.0
// dispatch and combine, once it is known what carries their rows.
#pragma once

#include "moe_ops/operators.hpp"
#include "moe_ops/row_exchange.hpp"

namespace automoe {

// Check the arguments and post the call. Throw as the exchange does.

DispatchStarted startDispatch(
    RowExchange& exchange,
    at::TensorList xs,
    const std::optional<at::Tensor>& topkWeights,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    bool packed);
CombineStarted startCombine(
    RowExchange& exchange,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& scalars,
    const at::Tensor& route,
    const at::Tensor& receiveIndex,
    int64_t numTokens,
    int64_t topK,
    bool packed);

}  // namespace automoe
