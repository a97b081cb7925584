// SPDX-License-Identifier: Apache-2.0
// Checks of tensors, and what the core knows them by. Errors are ValueError;
// `call` and `name` are the operator and the argument for their texts.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kernels/dtype.hpp"
#include "moe_ops/operators.hpp"
#include "process_group/common/error.hpp"
#include "process_group/exchange/route.hpp"
#include "process_group/work_automoe.hpp"

namespace automoe {

/// Runs a piece of the core with its errors turned into torch's.
template <typename Body>
auto withTorchErrors(Body&& body) {
  try {
    return std::forward<Body>(body)();
  } catch (const Error&) {
    throwForTorch(std::current_exception());
  }
}

// Where a device is not named, tensors are on the CPU.

/// Dense and on that device; returns it contiguous.
at::Tensor denseOn(
    c10::Device device,
    const char* call,
    const char* name,
    const at::Tensor& tensor);
/// (length,) int32; any length when it is -1.
at::Tensor int32List(
    const char* call,
    const char* name,
    const at::Tensor& tensor,
    int64_t length = -1,
    c10::Device device = c10::kCPU);
/// (T, K), int32 or int64.
at::Tensor checkedIds(
    const char* call,
    const at::Tensor& topkIds,
    c10::Device device = c10::kCPU);
/// What is wrong with the first id that is neither -1 nor an expert, or
/// nothing.
std::string findIllegalId(
    const char* call, const at::Tensor& ids, int64_t numExperts);
/// The numbers of permute.
void checkPermutation(int64_t numExperts, int64_t align);
/// At least one dimension, `count` rows (any number when it is -1).
at::Tensor rowsOf(
    const char* call,
    const char* name,
    const at::Tensor& tensor,
    int64_t count = -1,
    c10::Device device = c10::kCPU);
/// float64, float32, bfloat16 or float16, and of that shape.
at::Tensor floats(
    const char* call,
    const char* name,
    const at::Tensor& tensor,
    at::IntArrayRef sizes,
    c10::Device device = c10::kCPU);

/// What kernels compute with; nothing for other types.
std::optional<kernels::DType> numberOf(at::ScalarType type);
/// Throws for a type without arithmetic.
kernels::DType dtypeOf(
    const char* call, const char* name, const at::Tensor& tensor);
at::ScalarType sumTypeOf(kernels::DType dtype);
/// (count,) in the sum type of `dtype`; undefined when there is none.
at::Tensor sumValues(
    const char* call,
    const char* name,
    const std::optional<at::Tensor>& tensor,
    kernels::DType dtype,
    int64_t count,
    c10::Device device = c10::kCPU);

/// Elements and bytes of one row, also where there are no rows.
uint64_t rowElements(const at::Tensor& tensor);
uint64_t rowBytes(const at::Tensor& tensor);
/// A new tensor like this one, with so many rows.
at::Tensor emptyRows(const at::Tensor& like, int64_t count);
at::Tensor emptyList(
    int64_t count, at::ScalarType type, c10::Device device = c10::kCPU);
at::Tensor toTensor(std::span<const int32_t> values);

/// Route, receive index, number of tokens per expert, offsets.
PlanTensors toTensors(const PlanResult& result);

inline std::span<const int32_t> int32sOf(const at::Tensor& tensor) {
  return {
      tensor.const_data_ptr<int32_t>(), static_cast<size_t>(tensor.numel())};
}
/// Null for an undefined tensor.
inline const std::byte* bytesOf(const at::Tensor& tensor) {
  return tensor.defined()
             ? static_cast<const std::byte*>(tensor.const_data_ptr())
             : nullptr;
}
inline std::byte* mutableBytesOf(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<std::byte*>(tensor.mutable_data_ptr())
                          : nullptr;
}

/// Lets other Python threads run, where the calling one holds the GIL.
class ReleaseGil {
 public:
  ReleaseGil();
  ~ReleaseGil();
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  void* state_ = nullptr;
};

}  // namespace automoe
