// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/python_headers.h>
//
#include <ATen/ops/empty.h>

#include <cstring>
#include <limits>

#include "moe_ops/tensors.hpp"

namespace automoe {
namespace {

template <typename Id>
std::string findIllegal(
    const char* call, const at::Tensor& ids, int64_t numExperts) {
  const Id* values = ids.const_data_ptr<Id>();
  for (int64_t i = 0; i < ids.numel(); ++i) {
    if (values[i] < -1 || values[i] >= numExperts) {
      return concat(
          call,
          ": topk_ids[",
          i / ids.size(1),
          "][",
          i % ids.size(1),
          "] is ",
          values[i],
          ", expected -1 (no expert) or 0 to ",
          numExperts - 1);
    }
  }
  return "";
}

}  // namespace

at::Tensor denseOn(
    c10::Device device,
    const char* call,
    const char* name,
    const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(
      tensor.defined(), call, ": ", name, " is None, expected a tensor");
  TORCH_CHECK_VALUE(
      tensor.device() == device,
      call,
      ": ",
      name,
      " is on ",
      tensor.device(),
      ", expected ",
      device);
  TORCH_CHECK_VALUE(
      tensor.layout() == at::kStrided,
      call,
      ": ",
      name,
      " has layout ",
      tensor.layout(),
      ", expected a dense tensor");
  return tensor.resolve_conj().resolve_neg().contiguous();
}

at::Tensor int32List(
    const char* call,
    const char* name,
    const at::Tensor& tensor,
    int64_t length,
    c10::Device device) {
  at::Tensor list = denseOn(device, call, name, tensor);
  TORCH_CHECK_VALUE(
      list.scalar_type() == at::kInt && list.dim() == 1,
      call,
      ": ",
      name,
      " is ",
      list.scalar_type(),
      " of shape ",
      list.sizes(),
      ", expected Int with one dimension, as plan gave it");
  TORCH_CHECK_VALUE(
      length < 0 || list.numel() == length,
      call,
      ": ",
      name,
      " has ",
      list.numel(),
      " elements, expected ",
      length,
      " for this route");
  return list;
}

at::Tensor checkedIds(
    const char* call, const at::Tensor& topkIds, c10::Device device) {
  at::Tensor ids = denseOn(device, call, "topk_ids", topkIds);
  TORCH_CHECK_VALUE(
      ids.scalar_type() == at::kInt || ids.scalar_type() == at::kLong,
      call,
      ": topk_ids is ",
      ids.scalar_type(),
      ", expected Int or Long");
  TORCH_CHECK_VALUE(
      ids.dim() == 2 && ids.size(1) > 0,
      call,
      ": topk_ids has shape ",
      ids.sizes(),
      ", expected (T, K) with K > 0");
  TORCH_CHECK_VALUE(
      ids.numel() <= std::numeric_limits<int32_t>::max(),
      call,
      ": topk_ids has ",
      ids.numel(),
      " elements, expected at most ",
      std::numeric_limits<int32_t>::max());
  return ids;
}

std::string findIllegalId(
    const char* call, const at::Tensor& ids, int64_t numExperts) {
  return ids.scalar_type() == at::kLong
             ? findIllegal<int64_t>(call, ids, numExperts)
             : findIllegal<int32_t>(call, ids, numExperts);
}

void checkPermutation(int64_t numExperts, int64_t align) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(
      numExperts >= 1 && numExperts <= kMost && align >= 1 && align <= kMost,
      "permute: num_experts and align are ",
      numExperts,
      " and ",
      align,
      ", expected 1 to ",
      kMost);
}

at::Tensor rowsOf(
    const char* call,
    const char* name,
    const at::Tensor& tensor,
    int64_t count,
    c10::Device device) {
  at::Tensor rows = denseOn(device, call, name, tensor);
  TORCH_CHECK_VALUE(
      rows.dim() > 0 && (count < 0 || rows.size(0) == count),
      call,
      ": ",
      name,
      " has shape ",
      rows.sizes(),
      ", expected rows along dimension 0",
      count < 0 ? std::string() : c10::str(", ", count, " of them"));
  return rows;
}

at::Tensor floats(
    const char* call,
    const char* name,
    const at::Tensor& tensor,
    at::IntArrayRef sizes,
    c10::Device device) {
  at::Tensor values = denseOn(device, call, name, tensor);
  dtypeOf(call, name, values);
  TORCH_CHECK_VALUE(
      values.sizes() == sizes,
      call,
      ": ",
      name,
      " has shape ",
      values.sizes(),
      ", expected ",
      sizes);
  return values;
}

std::optional<kernels::DType> numberOf(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return kernels::DType::kFloat64;
    case at::kFloat:
      return kernels::DType::kFloat32;
    case at::kBFloat16:
      return kernels::DType::kBFloat16;
    case at::kHalf:
      return kernels::DType::kFloat16;
    default:
      return std::nullopt;
  }
}

kernels::DType dtypeOf(
    const char* call, const char* name, const at::Tensor& tensor) {
  const std::optional<kernels::DType> number = numberOf(tensor.scalar_type());
  TORCH_CHECK_VALUE(
      number.has_value(),
      call,
      ": ",
      name,
      " is ",
      tensor.scalar_type(),
      ", expected Double, Float, BFloat16 or Half");
  return *number;
}

at::ScalarType sumTypeOf(kernels::DType dtype) {
  return dtype == kernels::DType::kFloat64 ? at::kDouble : at::kFloat;
}

at::Tensor sumValues(
    const char* call,
    const char* name,
    const std::optional<at::Tensor>& tensor,
    kernels::DType dtype,
    int64_t count,
    c10::Device device) {
  if (!tensor.has_value()) {
    return {};
  }
  return floats(call, name, *tensor, {count}, device).to(sumTypeOf(dtype));
}

uint64_t rowElements(const at::Tensor& tensor) {
  uint64_t elements = 1;
  for (const int64_t size : tensor.sizes().slice(1)) {
    elements *= static_cast<uint64_t>(size);
  }
  return elements;
}

uint64_t rowBytes(const at::Tensor& tensor) {
  return rowElements(tensor) * tensor.element_size();
}

at::Tensor emptyRows(const at::Tensor& like, int64_t count) {
  std::vector<int64_t> sizes = like.sizes().vec();
  sizes[0] = count;
  return at::empty(
      sizes, at::TensorOptions(like.scalar_type()).device(like.device()));
}

at::Tensor emptyList(int64_t count, at::ScalarType type, c10::Device device) {
  return at::empty({count}, at::TensorOptions(type).device(device));
}

at::Tensor toTensor(std::span<const int32_t> values) {
  at::Tensor tensor = emptyList(static_cast<int64_t>(values.size()), at::kInt);
  if (!values.empty()) {
    std::memcpy(mutableBytesOf(tensor), values.data(), values.size_bytes());
  }
  return tensor;
}

PlanTensors toTensors(const PlanResult& result) {
  return {
      toTensor(result.route),
      toTensor(result.receiveIndex),
      toTensor(result.numTokensPerExpert),
      toTensor(result.offsets)};
}

ReleaseGil::ReleaseGil() {
  if (Py_IsInitialized() != 0 && PyGILState_Check() != 0) {
    state_ = PyEval_SaveThread();
  }
}

ReleaseGil::~ReleaseGil() {
  if (state_ != nullptr) {
    PyEval_RestoreThread(static_cast<PyThreadState*>(state_));
  }
}

}  // namespace automoe
