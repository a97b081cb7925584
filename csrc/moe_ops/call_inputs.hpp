// SPDX-License-Identifier: Apache-2.0
// What the collective operators are given: shapes and dtypes are written down
// in library.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace automoe {

struct PlanInputs {
  at::Tensor topkIds;
  int64_t numExperts;
  std::string groupName;
  int64_t align;
  int64_t maxReceiveTokens;
  std::vector<int64_t> reductionMap;
};

struct DispatchInputs {
  std::vector<at::Tensor> xs;
  std::optional<at::Tensor> topkWeights;
  at::Tensor route;
  at::Tensor receiveIndex;
  std::string groupName;
  bool packed;
};

struct CombineInputs {
  at::Tensor rows;
  std::optional<at::Tensor> weights;
  std::optional<at::Tensor> scalars;
  at::Tensor route;
  at::Tensor receiveIndex;
  std::string groupName;
  int64_t numTokens;
  int64_t topK;
  bool packed;
};

}  // namespace automoe
