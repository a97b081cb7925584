// SPDX-License-Identifier: Apache-2.0
// The all-to-alls of ProcessGroupAutoMoe.
#include <utility>

#include "process_group/collective_call.hpp"
#include "process_group/peer_all_to_all.hpp"
#include "process_group/process_group_automoe.hpp"
#include "process_group/work_automoe.hpp"

namespace automoe {

using WorkPtr = c10::intrusive_ptr<c10d::Work>;

namespace {

void checkTensor(const char* call, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(
      tensor.layout() == at::kStrided && tensor.is_contiguous(),
      call,
      ": ",
      name,
      " of shape ",
      tensor.sizes(),
      " and strides ",
      tensor.strides(),
      " is not contiguous; pass ",
      name,
      ".contiguous()");
}

void checkApart(
    const char* call, const at::Tensor& output, const at::Tensor& input) {
  // What is not contiguous is copied.
  const bool copied = !output.is_contiguous() || !input.is_contiguous();
  const auto* out = static_cast<const char*>(output.const_data_ptr());
  const auto* in = static_cast<const char*>(input.const_data_ptr());
  TORCH_CHECK(
      copied || output.nbytes() == 0 || input.nbytes() == 0 ||
          out + output.nbytes() <= in || in + input.nbytes() <= out,
      call,
      ": output and input share memory; pass separate tensors");
}

/// Blocks along dimension 0, one per rank.
std::vector<AllToAllArguments::Block> splitBlocks(
    const char* name,
    const at::Tensor& tensor,
    const std::vector<int64_t>& splits,
    int size) {
  TORCH_CHECK(
      tensor.dim() > 0,
      "all_to_all_single: ",
      name,
      " has no dimension to split");
  const int64_t rows = tensor.size(0);
  if (splits.empty()) {
    TORCH_CHECK_VALUE(
        rows % size == 0,
        "all_to_all_single: ",
        name,
        ".size(0) is ",
        rows,
        ", expected a multiple of the group's ",
        size,
        " ranks; or pass ",
        name,
        "_split_sizes");
  } else {
    int64_t sum = 0;
    for (const int64_t split : splits) {
      TORCH_CHECK_VALUE(
          split >= 0,
          "all_to_all_single: ",
          name,
          "_split_sizes holds ",
          split,
          ", expected sizes >= 0");
      sum += split;
    }
    TORCH_CHECK_VALUE(
        splits.size() == static_cast<size_t>(size) && sum == rows,
        "all_to_all_single: ",
        name,
        "_split_sizes has ",
        splits.size(),
        " entries that sum to ",
        sum,
        ", expected ",
        size,
        " that sum to ",
        name,
        ".size(0), ",
        rows);
  }
  const uint64_t rowBytes =
      rows == 0 ? 0 : tensor.nbytes() / static_cast<uint64_t>(rows);
  auto* data = static_cast<std::byte*>(tensor.data_ptr());
  std::vector<AllToAllArguments::Block> blocks;
  for (int rank = 0; rank < size; ++rank) {
    const int64_t count =
        splits.empty() ? rows / size : splits[static_cast<size_t>(rank)];
    const uint64_t bytes = static_cast<uint64_t>(count) * rowBytes;
    blocks.push_back({data, bytes});
    data += bytes;
  }
  return blocks;
}

}  // namespace

WorkPtr ProcessGroupAutoMoe::postAllToAll(
    AllToAllArguments arguments,
    OperationTensors* tensors,
    const CallInfo& call,
    const c10d::AllToAllOptions& options) {
  const at::Tensor& like = call.inputs.front();
  arguments.dtype = static_cast<uint8_t>(like.scalar_type());
  arguments.elementBytes = static_cast<uint32_t>(like.element_size());
  arguments.dtypeName = &dtypeName;
  return launch(tensors, call, [&](OperationCallbacks callbacks) {
    return group_->allToAll(
        std::move(arguments), orDefault(options.timeout), std::move(callbacks));
  });
}

WorkPtr ProcessGroupAutoMoe::alltoall_base(
    at::Tensor& output,
    at::Tensor& input,
    std::vector<int64_t>& outputSplitSizes,
    std::vector<int64_t>& inputSplitSizes,
    const c10d::AllToAllOptions& options) {
  if (outputSplitSizes.empty() && inputSplitSizes.empty()) {
    try {
      WorkPtr peer = tryPeerAllToAll(
          {engine_, group_, options_},
          output,
          input,
          orDefault(options.timeout),
          inner_.get());
      if (peer != nullptr) {
        return peer;
      }
    } catch (const Error&) {
      throwForTorch(std::current_exception());
    }
  }
  if (auto* device = inner("all_to_all_single", {output, input})) {
    return device->alltoall_base(
        output, input, outputSplitSizes, inputSplitSizes, options);
  }
  checkTensor("all_to_all_single", "output", output);
  checkTensor("all_to_all_single", "input", input);
  TORCH_CHECK_VALUE(
      output.scalar_type() == input.scalar_type(),
      "all_to_all_single: output is ",
      output.scalar_type(),
      ", expected the dtype of input, ",
      input.scalar_type());
  checkApart("all_to_all_single", output, input);
  AllToAllArguments arguments;
  arguments.sends = splitBlocks("input", input, inputSplitSizes, size_);
  arguments.receives = splitBlocks("output", output, outputSplitSizes, size_);
  if (input.size(0) > 0) {
    arguments.rowBytes = input.nbytes() / static_cast<uint64_t>(input.size(0));
  }
  return postAllToAll(
      std::move(arguments),
      new OperationTensors({input}, {output}),
      {c10d::OpType::ALLTOALL_BASE,
       "automoe:all_to_all",
       {input},
       {output},
       inputSplitSizes,
       outputSplitSizes},
      options);
}

WorkPtr ProcessGroupAutoMoe::alltoall(
    Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) {
  if (auto* device = inner("all_to_all", inputs)) {
    return device->alltoall(outputs, inputs, options);
  }
  const auto size = static_cast<size_t>(size_);
  TORCH_CHECK_VALUE(
      outputs.size() == size && inputs.size() == size,
      "all_to_all: got ",
      outputs.size(),
      " output and ",
      inputs.size(),
      " input tensors, expected one for each of ",
      size,
      " ranks");
  CollectiveCall call(
      "automoe:all_to_all",
      c10d::OpType::ALLTOALL,
      OperationKind::kAllToAll,
      orDefault(options.timeout));
  AllToAllArguments arguments;
  for (size_t rank = 0; rank < size; ++rank) {
    call.checkSameType(inputs[rank], inputs.front());
    call.checkSameType(outputs[rank], inputs.front());
    for (const auto& input : inputs) {
      checkApart(call.name(), outputs[rank], input);
    }
    const ConstBlock block = call.input(inputs[rank]);
    arguments.sends.push_back(
        {const_cast<std::byte*>(block.data), block.bytes});  // only read
  }
  for (const Block& block : call.outputs(outputs)) {
    arguments.receives.push_back({block.data, block.bytes});
  }
  const CallInfo info{call.type(), call.title(), inputs, outputs, {}, {}};
  return postAllToAll(std::move(arguments), call.takeTensors(), info, options);
}

}  // namespace automoe
