// SPDX-License-Identifier: Apache-2.0
#include "process_group/collective_call.hpp"

#include <ATen/ATen.h>
#include <c10/core/ScalarType.h>

#include <cstring>
#include <iterator>
#include <utility>

namespace automoe {
namespace {

using kernels::ElementType;
using kernels::ReduceOperation;

std::optional<ElementType> elementTypeOf(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBool:
      return ElementType::kBool;
    case at::kChar:
      return ElementType::kInt8;
    case at::kByte:
      return ElementType::kUInt8;
    case at::kShort:
      return ElementType::kInt16;
    case at::kUInt16:
      return ElementType::kUInt16;
    case at::kInt:
      return ElementType::kInt32;
    case at::kUInt32:
      return ElementType::kUInt32;
    case at::kLong:
      return ElementType::kInt64;
    case at::kUInt64:
      return ElementType::kUInt64;
    case at::kHalf:
    case at::kComplexHalf:
      return ElementType::kFloat16;
    case at::kBFloat16:
      return ElementType::kBFloat16;
    case at::kFloat:
    case at::kComplexFloat:
      return ElementType::kFloat32;
    case at::kDouble:
    case at::kComplexDouble:
      return ElementType::kFloat64;
    default:
      return std::nullopt;
  }
}

// Averages and scaled sums are sums with something before or after.
std::optional<ReduceOperation> operationOf(c10d::ReduceOp::RedOpType type) {
  switch (type) {
    case c10d::ReduceOp::SUM:
    case c10d::ReduceOp::AVG:
    case c10d::ReduceOp::PREMUL_SUM:
      return ReduceOperation::kSum;
    case c10d::ReduceOp::PRODUCT:
      return ReduceOperation::kProduct;
    case c10d::ReduceOp::MIN:
      return ReduceOperation::kMin;
    case c10d::ReduceOp::MAX:
      return ReduceOperation::kMax;
    case c10d::ReduceOp::BAND:
      return ReduceOperation::kBitAnd;
    case c10d::ReduceOp::BOR:
      return ReduceOperation::kBitOr;
    case c10d::ReduceOp::BXOR:
      return ReduceOperation::kBitXor;
    default:
      return std::nullopt;
  }
}

at::Tensor scaled(
    const char* name, const c10d::ReduceOp& operation, const at::Tensor& it) {
  const auto* factor =
      dynamic_cast<c10d::PreMulSumSupplement*>(operation.supplement_.get());
  TORCH_CHECK_VALUE(
      factor != nullptr,
      name,
      ": op PREMUL_SUM has no factor; make it by "
      "torch.distributed._make_nccl_premul_sum(factor)");
  const at::AutoDispatchBelowADInplaceOrView below;
  return factor->tensor_factor.defined()
             ? it.mul(factor->tensor_factor.to(it.scalar_type()))
             : it.mul(factor->double_factor);
}

Block blockOf(const at::Tensor& tensor) {
  return {static_cast<std::byte*>(tensor.data_ptr()), tensor.nbytes()};
}

bool sameMemory(const at::Tensor& a, const at::Tensor& b) {
  const auto* left = static_cast<const std::byte*>(a.const_data_ptr());
  const auto* right = static_cast<const std::byte*>(b.const_data_ptr());
  return a.nbytes() > 0 && b.nbytes() > 0 && left < right + b.nbytes() &&
         right < left + a.nbytes();
}

}  // namespace

const char* dtypeName(uint8_t dtype) {
  return c10::toString(static_cast<c10::ScalarType>(dtype));
}

const char* reduceOpName(uint8_t operation) {
  static const char* const names[] = {
      "SUM",
      "AVG",
      "PRODUCT",
      "MIN",
      "MAX",
      "BAND",
      "BOR",
      "BXOR",
      "PREMUL_SUM"};
  return operation < std::size(names) ? names[operation] : "?";
}

CollectiveCall::CollectiveCall(
    const char* title,
    c10d::OpType type,
    OperationKind kind,
    std::chrono::milliseconds timeout)
    : title_(title),
      name_(std::strchr(title, ':') + 1),
      type_(type),
      timeout_(timeout) {
  description_.operation = kind;
  description_.dtypeName = &dtypeName;
  description_.reductionName = &reduceOpName;
}

// ---- tensors ----

void CollectiveCall::checkLayout(const at::Tensor& tensor) const {
  TORCH_CHECK_VALUE(
      tensor.layout() == at::kStrided,
      name_,
      ": a tensor has the layout ",
      tensor.layout(),
      ", expected a dense one");
}

void CollectiveCall::checkSameType(
    const at::Tensor& tensor, const at::Tensor& like) const {
  TORCH_CHECK_VALUE(
      tensor.scalar_type() == like.scalar_type(),
      name_,
      ": got tensors of ",
      tensor.scalar_type(),
      " and ",
      like.scalar_type(),
      ", expected one dtype");
}

void CollectiveCall::checkSameSize(
    const at::Tensor& tensor, const at::Tensor& like) const {
  TORCH_CHECK_VALUE(
      tensor.numel() == like.numel(),
      name_,
      ": got tensors of shapes ",
      tensor.sizes(),
      " and ",
      like.sizes(),
      ", expected equal sizes");
}

ConstBlock CollectiveCall::input(const at::Tensor& tensor) {
  checkLayout(tensor);
  return input(tensor, tensor);
}

ConstBlock CollectiveCall::input(
    const at::Tensor& tensor, const at::Tensor& converted) {
  inputs_.push_back(tensor);
  return keep(converted);
}

ConstBlock CollectiveCall::keep(const at::Tensor& tensor) {
  const at::AutoDispatchBelowADInplaceOrView below;
  kept_.push_back(tensor.contiguous());
  const Block block = blockOf(kept_.back());
  return {block.data, block.bytes};
}

Block CollectiveCall::standIn(const at::Tensor& tensor, bool filled) {
  const at::AutoDispatchBelowADInplaceOrView below;
  kept_.push_back(
      filled ? tensor.contiguous()
             : at::empty(tensor.sizes(), tensor.options()));
  standIns_.push_back({tensor, kept_.back()});
  return blockOf(kept_.back());
}

Block CollectiveCall::output(const at::Tensor& tensor) {
  checkLayout(tensor);
  outputs_.push_back(tensor);
  return tensor.is_contiguous() ? blockOf(tensor) : standIn(tensor, false);
}

Block CollectiveCall::inPlace(const at::Tensor& tensor) {
  checkLayout(tensor);
  inputs_.push_back(tensor);
  outputs_.push_back(tensor);
  return tensor.is_contiguous() ? blockOf(tensor) : standIn(tensor, true);
}

std::vector<Block> CollectiveCall::outputs(const Tensors& tensors) {
  bool shared = false;
  for (size_t i = 0; i < tensors.size() && !shared; ++i) {
    for (size_t j = 0; j < i && !shared; ++j) {
      shared = sameMemory(tensors[i], tensors[j]);
    }
  }
  std::vector<Block> blocks;
  for (const at::Tensor& tensor : tensors) {
    if (!shared) {
      blocks.push_back(output(tensor));
      continue;
    }
    checkLayout(tensor);
    outputs_.push_back(tensor);
    blocks.push_back(standIn(tensor, false));
  }
  return blocks;
}

at::Tensor CollectiveCall::pack(const Tensors& tensors) {
  const at::AutoDispatchBelowADInplaceOrView below;
  Tensors flat;
  for (const at::Tensor& tensor : tensors) {
    checkLayout(tensor);
    checkSameType(tensor, tensors.front());
    inputs_.push_back(tensor);
    flat.push_back(tensor.reshape(-1));
  }
  return at::cat(flat);
}

Block CollectiveCall::packed(const Tensors& tensors) {
  int64_t elements = 0;
  for (const at::Tensor& tensor : tensors) {
    checkLayout(tensor);
    checkSameType(tensor, tensors.front());
    elements += tensor.numel();
  }
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor flat = at::empty({elements}, tensors.front().options());
  kept_.push_back(flat);
  int64_t begin = 0;
  for (const at::Tensor& tensor : tensors) {
    outputs_.push_back(tensor);
    const int64_t count = tensor.numel();
    standIns_.push_back(
        {tensor, flat.narrow(0, begin, count).view(tensor.sizes())});
    begin += count;
  }
  return blockOf(flat);
}

// ---- what the ranks agree on ----

void CollectiveCall::describe(
    const at::Tensor& like, int root, uint64_t totalBytes) {
  description_.dtype = static_cast<uint8_t>(like.scalar_type());
  description_.root = root;
  description_.total = totalBytes;
}

at::Tensor CollectiveCall::setReduction(
    const c10d::ReduceOp& operation, const at::Tensor& tensor, int size) {
  const auto type = static_cast<c10d::ReduceOp::RedOpType>(operation.op_);
  const auto kind = operationOf(type);
  const auto element = elementTypeOf(tensor.scalar_type());
  const bool scales =
      type == c10d::ReduceOp::AVG || type == c10d::ReduceOp::PREMUL_SUM;
  const bool complexSum =
      !tensor.is_complex() || type == c10d::ReduceOp::SUM || scales;
  const bool floats = tensor.is_floating_point() || tensor.is_complex();
  const bool scalable =
      !scales || floats ||
      (type == c10d::ReduceOp::AVG && tensor.scalar_type() != at::kBool);
  TORCH_CHECK_VALUE(
      kind.has_value() && element.has_value() && complexSum && scalable &&
          kernels::supports(*element, *kind),
      name_,
      ": op ",
      reduceOpName(static_cast<uint8_t>(type)),
      " of tensors of ",
      tensor.scalar_type(),
      " is not defined; convert the tensor, or take another op");
  reduction_.type = *element;
  reduction_.operation = *kind;
  if (type == c10d::ReduceOp::AVG) {
    reduction_.divisor = static_cast<uint32_t>(size);
  }
  description_.reduction = static_cast<uint8_t>(type);
  return type == c10d::ReduceOp::PREMUL_SUM ? scaled(name_, operation, tensor)
                                            : tensor;
}

// ---- to post ----

ScheduledArguments CollectiveCall::takeArguments() {
  return {std::move(schedule_), description_, reduction_};
}

OperationTensors* CollectiveCall::takeTensors() {
  Tensors kept = inputs_;
  kept.insert(kept.end(), kept_.begin(), kept_.end());
  return new OperationTensors(std::move(kept), outputs_, std::move(standIns_));
}

}  // namespace automoe
