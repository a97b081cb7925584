// SPDX-License-Identifier: Apache-2.0
// The collective operators, once it is known what carries their rows.
#pragma once

#include "moe_ops/call_inputs.hpp"
#include "moe_ops/operators.hpp"
#include "moe_ops/row_exchange.hpp"

namespace automoe {

/// On tensors of the host; blocks.
PlanTensors planOnHost(const PlanInputs& inputs);

// Check the arguments and post the call. Throw as the exchange does.

DispatchStarted startDispatch(
    RowExchange& exchange, const DispatchInputs& inputs);
CombineStarted startCombine(RowExchange& exchange, const CombineInputs& inputs);

// The same by what the device of the tensors calls for, with torch's errors.

DispatchStarted startDispatch(const DispatchInputs& inputs);
CombineStarted startCombine(const CombineInputs& inputs);

}  // namespace automoe
