// SPDX-License-Identifier: Apache-2.0
// The collectives of ProcessGroupAutoMoe but for all-to-all: which memory,
// which schedule.
#include <utility>

#include "process_group/collective_call.hpp"
#include "process_group/process_group_automoe.hpp"

namespace automoe {

using c10d::OpType;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

namespace {

const at::Tensor& single(
    const char* call, const std::vector<at::Tensor>& tensors) {
  TORCH_CHECK_VALUE(
      tensors.size() == 1,
      call,
      ": got ",
      tensors.size(),
      " tensors, expected one");
  return tensors.front();
}

const std::vector<at::Tensor>& perRank(
    const char* call,
    const char* what,
    const std::vector<std::vector<at::Tensor>>& lists,
    int size) {
  TORCH_CHECK_VALUE(
      lists.size() == 1 && lists.front().size() == static_cast<size_t>(size),
      call,
      ": ",
      what,
      " has ",
      lists.empty() ? 0 : lists.front().size(),
      " tensors, expected one for each of ",
      size,
      " ranks");
  return lists.front();
}

uint64_t totalOf(const std::vector<Block>& blocks) {
  uint64_t total = 0;
  for (const Block& block : blocks) {
    total += block.bytes;
  }
  return total;
}

// Equal parts, one per rank.
template <typename Part>
std::vector<Part> partsOf(Part whole, int size) {
  std::vector<Part> parts;
  const uint64_t bytes = whole.bytes / static_cast<uint64_t>(size);
  for (int rank = 0; rank < size; ++rank) {
    parts.push_back({whole.data, bytes});
    whole.data += bytes;
  }
  return parts;
}

void checkParts(
    const char* call,
    const char* many,
    const at::Tensor& all,
    const char* one,
    const at::Tensor& part,
    int size) {
  TORCH_CHECK_VALUE(
      all.numel() == part.numel() * size,
      call,
      ": ",
      many,
      " has ",
      all.numel(),
      " elements, expected those of ",
      one,
      ", ",
      part.numel(),
      ", times the group's ",
      size,
      " ranks");
}

}  // namespace

int ProcessGroupAutoMoe::checkRoot(const char* call, int64_t root) const {
  TORCH_CHECK_VALUE(
      root >= 0 && root < size_,
      call,
      ": the root is ",
      root,
      ", expected a rank of a group of ",
      size_);
  return static_cast<int>(root);
}

// ---- one to all, all to one ----

WorkPtr ProcessGroupAutoMoe::broadcast(
    Tensors& tensors, const c10d::BroadcastOptions& options) {
  if (auto* device = inner("broadcast", tensors)) {
    return device->broadcast(tensors, options);
  }
  CollectiveCall call(
      "automoe:broadcast",
      OpType::BROADCAST,
      OperationKind::kBroadcast,
      orDefault(options.timeout));
  const at::Tensor& tensor = single(call.name(), tensors);
  const int root = checkRoot(call.name(), options.rootRank);
  const Block block = call.inPlace(tensor);
  call.describe(tensor, root, block.bytes);
  call.setSchedule(makeBroadcast(topology(), root, block.data, block.bytes));
  return post(std::move(call));
}

WorkPtr ProcessGroupAutoMoe::gather(
    TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) {
  if (auto* device = inner("gather", inputs)) {
    return device->gather(outputs, inputs, options);
  }
  CollectiveCall call(
      "automoe:gather",
      OpType::GATHER,
      OperationKind::kGather,
      orDefault(options.timeout));
  const at::Tensor& tensor = single(call.name(), inputs);
  const int root = checkRoot(call.name(), options.rootRank);
  const ConstBlock from = call.input(tensor);
  std::vector<Block> to;
  if (rank_ == root) {
    for (const at::Tensor& output :
         perRank(call.name(), "gather_list", outputs, size_)) {
      call.checkSameType(output, tensor);
      call.checkSameSize(output, tensor);
    }
    to = call.outputs(outputs.front());
  } else {
    TORCH_CHECK_VALUE(
        outputs.empty() || outputs.front().empty(),
        "gather: gather_list is given on rank ",
        rank_,
        ", expected only on the destination, rank ",
        root);
  }
  call.describe(tensor, root, from.bytes);
  call.setSchedule(makeGather(topology(), root, from, to));
  return post(std::move(call));
}

#ifdef C10D_BACKEND_HAS_HOOKS
WorkPtr ProcessGroupAutoMoe::gather_into_tensor(
    at::Tensor& output, at::Tensor& input, const c10d::GatherOptions& options) {
  if (auto* device = inner("gather_into_tensor", {input})) {
    return device->gather_into_tensor(output, input, options);
  }
  CollectiveCall call(
      "automoe:gather",
      OpType::GATHER,
      OperationKind::kGather,
      orDefault(options.timeout));
  const int root = checkRoot(call.name(), options.rootRank);
  const ConstBlock from = call.input(input);
  std::vector<Block> to;
  if (rank_ == root) {
    call.checkSameType(output, input);
    checkParts(call.name(), "output", output, "input", input, size_);
    to = partsOf(call.output(output), size_);
  }
  call.describe(input, root, from.bytes);
  call.setSchedule(makeGather(topology(), root, from, to));
  return post(std::move(call));
}
#endif

WorkPtr ProcessGroupAutoMoe::scatter(
    Tensors& outputs,
    TensorLists& inputs,
    const c10d::ScatterOptions& options) {
  if (auto* device = inner("scatter", outputs)) {
    return device->scatter(outputs, inputs, options);
  }
  CollectiveCall call(
      "automoe:scatter",
      OpType::SCATTER,
      OperationKind::kScatter,
      orDefault(options.timeout));
  const at::Tensor& tensor = single(call.name(), outputs);
  const int root = checkRoot(call.name(), options.rootRank);
  const Block to = call.output(tensor);
  std::vector<ConstBlock> from;
  if (rank_ == root) {
    for (const at::Tensor& input :
         perRank(call.name(), "scatter_list", inputs, size_)) {
      call.checkSameType(input, tensor);
      call.checkSameSize(input, tensor);
      from.push_back(call.input(input));
    }
  } else {
    TORCH_CHECK_VALUE(
        inputs.empty() || inputs.front().empty(),
        "scatter: scatter_list is given on rank ",
        rank_,
        ", expected only on the source, rank ",
        root);
  }
  call.describe(tensor, root, to.bytes);
  call.setSchedule(makeScatter(topology(), root, from, to));
  return post(std::move(call));
}

// ---- all to all of them ----

WorkPtr ProcessGroupAutoMoe::postAllGather(
    CollectiveCall call,
    const at::Tensor& like,
    ConstBlock from,
    const std::vector<Block>& to) {
  const Block& own = to[static_cast<size_t>(rank_)];
  TORCH_CHECK_VALUE(
      own.bytes == from.bytes,
      call.name(),
      ": the input has ",
      from.bytes,
      " bytes, the output for rank ",
      rank_,
      ", which is this one, ",
      own.bytes,
      "; expected the same");
  call.describe(like, 0, totalOf(to));
  call.setSchedule(makeAllGather(topology(), from, to));
  return post(std::move(call));
}

WorkPtr ProcessGroupAutoMoe::allgather(
    TensorLists& outputs,
    Tensors& inputs,
    const c10d::AllgatherOptions& options) {
  if (auto* device = inner("all_gather", inputs)) {
    return device->allgather(outputs, inputs, options);
  }
  CollectiveCall call(
      "automoe:all_gather",
      OpType::ALLGATHER,
      OperationKind::kAllGather,
      orDefault(options.timeout));
  const at::Tensor& tensor = single(call.name(), inputs);
  const Tensors& list = perRank(call.name(), "tensor_list", outputs, size_);
  for (const at::Tensor& output : list) {
    call.checkSameType(output, tensor);
  }
  const ConstBlock from = call.input(tensor);
  const auto to = call.outputs(list);
  return postAllGather(std::move(call), tensor, from, to);
}

WorkPtr ProcessGroupAutoMoe::_allgather_base(
    at::Tensor& output,
    at::Tensor& input,
    const c10d::AllgatherOptions& options) {
  if (auto* device = inner("all_gather_into_tensor", {output, input})) {
    return device->_allgather_base(output, input, options);
  }
  CollectiveCall call(
      "automoe:all_gather_into_tensor",
      OpType::_ALLGATHER_BASE,
      OperationKind::kAllGather,
      orDefault(options.timeout));
  call.checkSameType(output, input);
  checkParts(call.name(), "output", output, "input", input, size_);
  const ConstBlock from = call.input(input);
  const auto to = partsOf(call.output(output), size_);
  return postAllGather(std::move(call), input, from, to);
}

WorkPtr ProcessGroupAutoMoe::allgather_coalesced(
    TensorLists& outputs,
    Tensors& inputs,
    const c10d::AllgatherOptions& options) {
  if (auto* device = inner("all_gather_coalesced", inputs)) {
    return device->allgather_coalesced(outputs, inputs, options);
  }
  CollectiveCall call(
      "automoe:all_gather",
      OpType::ALLGATHER_COALESCED,
      OperationKind::kAllGather,
      orDefault(options.timeout));
  TORCH_CHECK_VALUE(
      !inputs.empty() && outputs.size() == static_cast<size_t>(size_),
      "all_gather_coalesced: got ",
      inputs.size(),
      " inputs and ",
      outputs.size(),
      " lists of outputs, expected at least one input, and one list for each "
      "of ",
      size_,
      " ranks");
  const ConstBlock from = call.keep(call.pack(inputs));
  std::vector<Block> to;
  for (const Tensors& list : outputs) {
    TORCH_CHECK_VALUE(
        list.size() == inputs.size(),
        "all_gather_coalesced: a list of outputs has ",
        list.size(),
        " tensors, expected one for each of ",
        inputs.size(),
        " inputs");
    call.checkSameType(list.front(), inputs.front());
    to.push_back(call.packed(list));
  }
  return postAllGather(std::move(call), inputs.front(), from, to);
}

WorkPtr ProcessGroupAutoMoe::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  if (auto* device = inner("all_gather_into_tensor_coalesced", inputs)) {
    return device->allgather_into_tensor_coalesced(outputs, inputs, options);
  }
  return together(outputs, inputs, [&](size_t i) {
    return _allgather_base(outputs[i], inputs[i], options);
  });
}

// ---- sums ----

WorkPtr ProcessGroupAutoMoe::allreduce(
    Tensors& tensors, const c10d::AllreduceOptions& options) {
  if (auto* device = inner("all_reduce", tensors)) {
    return device->allreduce(tensors, options);
  }
  CollectiveCall call(
      "automoe:all_reduce",
      OpType::ALLREDUCE,
      OperationKind::kAllReduce,
      orDefault(options.timeout));
  const at::Tensor& tensor = single(call.name(), tensors);
  if (tensor.layout() == at::kSparse) {
    return allreduce_sparse(tensors, options);
  }
  const at::Tensor read = call.setReduction(options.reduceOp, tensor, size_);
  const bool scaled = !read.is_same(tensor);
  const Block to = call.inPlace(tensor);
  const std::byte* from = scaled ? call.keep(read).data : to.data;
  call.describe(tensor, 0, to.bytes);
  call.setSchedule(
      makeAllReduce(topology(), call.reduction(), from, to.data, to.bytes));
  return post(std::move(call));
}

WorkPtr ProcessGroupAutoMoe::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  if (auto* device = inner("all_reduce_coalesced", tensors)) {
    return device->allreduce_coalesced(tensors, options);
  }
  CollectiveCall call(
      "automoe:all_reduce",
      OpType::ALLREDUCE_COALESCED,
      OperationKind::kAllReduce,
      orDefault(options.timeout));
  TORCH_CHECK_VALUE(
      !tensors.empty(), "all_reduce_coalesced: got no tensors, expected some");
  const at::Tensor read =
      call.setReduction(options.reduceOp, call.pack(tensors), size_);
  const ConstBlock from = call.keep(read);
  const Block to = call.packed(tensors);
  call.describe(tensors.front(), 0, to.bytes);
  call.setSchedule(makeAllReduce(
      topology(), call.reduction(), from.data, to.data, to.bytes));
  return post(std::move(call));
}

WorkPtr ProcessGroupAutoMoe::reduce(
    Tensors& tensors, const c10d::ReduceOptions& options) {
  if (auto* device = inner("reduce", tensors)) {
    return device->reduce(tensors, options);
  }
  CollectiveCall call(
      "automoe:reduce",
      OpType::REDUCE,
      OperationKind::kReduce,
      orDefault(options.timeout));
  const at::Tensor& tensor = single(call.name(), tensors);
  const int root = checkRoot(call.name(), options.rootRank);
  const at::Tensor read = call.setReduction(options.reduceOp, tensor, size_);
  const bool scaled = !read.is_same(tensor);
  // Other ranks' tensors stay as they are.
  Block to;
  ConstBlock from;
  if (rank_ == root) {
    to = call.inPlace(tensor);
    from = scaled ? call.keep(read) : ConstBlock{to.data, to.bytes};
  } else {
    from = call.input(tensor, read);
  }
  call.describe(tensor, root, from.bytes);
  call.setSchedule(makeReduce(
      topology(), call.reduction(), root, from.data, to.data, from.bytes));
  return post(std::move(call));
}

WorkPtr ProcessGroupAutoMoe::reduce_scatter(
    Tensors& outputs,
    TensorLists& inputs,
    const c10d::ReduceScatterOptions& options) {
  if (auto* device = inner("reduce_scatter", outputs)) {
    return device->reduce_scatter(outputs, inputs, options);
  }
  CollectiveCall call(
      "automoe:reduce_scatter",
      OpType::REDUCE_SCATTER,
      OperationKind::kReduceScatter,
      orDefault(options.timeout));
  const at::Tensor& output = single(call.name(), outputs);
  uint64_t total = 0;
  std::vector<ConstBlock> from;
  for (const at::Tensor& input :
       perRank(call.name(), "input_list", inputs, size_)) {
    call.checkSameType(input, output);
    from.push_back(
        call.input(input, call.setReduction(options.reduceOp, input, size_)));
    total += from.back().bytes;
  }
  call.checkSameSize(inputs.front()[static_cast<size_t>(rank_)], output);
  const Block to = call.output(output);
  call.describe(output, 0, total);
  call.setSchedule(makeReduceScatter(topology(), call.reduction(), from, to));
  return post(std::move(call));
}

WorkPtr ProcessGroupAutoMoe::_reduce_scatter_base(
    at::Tensor& output,
    at::Tensor& input,
    const c10d::ReduceScatterOptions& options) {
  if (auto* device = inner("reduce_scatter_tensor", {output, input})) {
    return device->_reduce_scatter_base(output, input, options);
  }
  CollectiveCall call(
      "automoe:reduce_scatter_tensor",
      OpType::_REDUCE_SCATTER_BASE,
      OperationKind::kReduceScatter,
      orDefault(options.timeout));
  call.checkSameType(output, input);
  checkParts(call.name(), "input", input, "output", output, size_);
  const ConstBlock whole =
      call.input(input, call.setReduction(options.reduceOp, input, size_));
  const Block to = call.output(output);
  call.describe(output, 0, whole.bytes);
  call.setSchedule(makeReduceScatter(
      topology(), call.reduction(), partsOf(whole, size_), to));
  return post(std::move(call));
}

WorkPtr ProcessGroupAutoMoe::reduce_scatter_tensor_coalesced(
    Tensors& outputs,
    Tensors& inputs,
    const c10d::ReduceScatterOptions& options) {
  if (auto* device = inner("reduce_scatter_tensor_coalesced", inputs)) {
    return device->reduce_scatter_tensor_coalesced(outputs, inputs, options);
  }
  return together(outputs, inputs, [&](size_t i) {
    return _reduce_scatter_base(outputs[i], inputs[i], options);
  });
}

}  // namespace automoe
