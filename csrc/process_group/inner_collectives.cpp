// SPDX-License-Identifier: Apache-2.0
// The collectives of ProcessGroupAutoMoe that the inner group runs.
#include <utility>

#include "process_group/inner_work.hpp"
#include "process_group/process_group_automoe.hpp"

namespace automoe {

using c10d::Backend;
using c10d::Work;
using WorkPtr = c10::intrusive_ptr<Work>;

Backend& ProcessGroupAutoMoe::inner(
    const char* collective, const Tensors& tensors) {
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(
        tensor.device().is_cpu(),
        collective,
        ": a tensor is on ",
        tensor.device(),
        ", expected cpu: this version moves CPU tensors only");
  }
  TORCH_CHECK_VALUE(
      inner_ != nullptr,
      collective,
      ": group ",
      group_->name(),
      " has been destroyed on this rank");
  calls_ += 1;
  return *inner_;
}

WorkPtr ProcessGroupAutoMoe::wrap(WorkPtr work) {
  if (work == nullptr) {
    return work;
  }
  const c10d::OpType type = work->retrieveOpType();
  return c10::make_intrusive<InnerWork>(
      std::move(work), engine_, group_, !c10d::isP2POp(type));
}

WorkPtr ProcessGroupAutoMoe::broadcast(
    Tensors& tensors, const c10d::BroadcastOptions& options) {
  return wrap(inner("broadcast", tensors).broadcast(tensors, options));
}

WorkPtr ProcessGroupAutoMoe::allreduce(
    Tensors& tensors, const c10d::AllreduceOptions& options) {
  return wrap(inner("all_reduce", tensors).allreduce(tensors, options));
}

WorkPtr ProcessGroupAutoMoe::allreduce_sparse(
    Tensors& tensors, const c10d::AllreduceOptions& options) {
  return wrap(inner("all_reduce", tensors).allreduce_sparse(tensors, options));
}

WorkPtr ProcessGroupAutoMoe::allreduce_coalesced(
    Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  return wrap(inner("all_reduce_coalesced", tensors)
                  .allreduce_coalesced(tensors, options));
}

WorkPtr ProcessGroupAutoMoe::reduce(
    Tensors& tensors, const c10d::ReduceOptions& options) {
  return wrap(inner("reduce", tensors).reduce(tensors, options));
}

WorkPtr ProcessGroupAutoMoe::allgather(
    TensorLists& outputs,
    Tensors& inputs,
    const c10d::AllgatherOptions& options) {
  return wrap(inner("all_gather", inputs).allgather(outputs, inputs, options));
}

WorkPtr ProcessGroupAutoMoe::_allgather_base(
    at::Tensor& output,
    at::Tensor& input,
    const c10d::AllgatherOptions& options) {
  return wrap(inner("all_gather_into_tensor", Tensors{output, input})
                  ._allgather_base(output, input, options));
}

WorkPtr ProcessGroupAutoMoe::allgather_coalesced(
    TensorLists& outputs,
    Tensors& inputs,
    const c10d::AllgatherOptions& options) {
  return wrap(inner("all_gather_coalesced", inputs)
                  .allgather_coalesced(outputs, inputs, options));
}

WorkPtr ProcessGroupAutoMoe::allgather_into_tensor_coalesced(
    Tensors& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) {
  return wrap(inner("all_gather_into_tensor_coalesced", inputs)
                  .allgather_into_tensor_coalesced(outputs, inputs, options));
}

WorkPtr ProcessGroupAutoMoe::gather(
    TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) {
  return wrap(inner("gather", inputs).gather(outputs, inputs, options));
}

WorkPtr ProcessGroupAutoMoe::scatter(
    Tensors& outputs,
    TensorLists& inputs,
    const c10d::ScatterOptions& options) {
  return wrap(inner("scatter", outputs).scatter(outputs, inputs, options));
}

WorkPtr ProcessGroupAutoMoe::reduce_scatter(
    Tensors& outputs,
    TensorLists& inputs,
    const c10d::ReduceScatterOptions& options) {
  return wrap(inner("reduce_scatter", outputs)
                  .reduce_scatter(outputs, inputs, options));
}

WorkPtr ProcessGroupAutoMoe::_reduce_scatter_base(
    at::Tensor& output,
    at::Tensor& input,
    const c10d::ReduceScatterOptions& options) {
  return wrap(inner("reduce_scatter_tensor", Tensors{output, input})
                  ._reduce_scatter_base(output, input, options));
}

WorkPtr ProcessGroupAutoMoe::reduce_scatter_tensor_coalesced(
    Tensors& outputs,
    Tensors& inputs,
    const c10d::ReduceScatterOptions& options) {
  return wrap(inner("reduce_scatter_tensor_coalesced", inputs)
                  .reduce_scatter_tensor_coalesced(outputs, inputs, options));
}

WorkPtr ProcessGroupAutoMoe::send(Tensors& tensors, int destination, int tag) {
  return wrap(inner("send", tensors).send(tensors, destination, tag));
}

WorkPtr ProcessGroupAutoMoe::recv(Tensors& tensors, int source, int tag) {
  return wrap(inner("recv", tensors).recv(tensors, source, tag));
}

WorkPtr ProcessGroupAutoMoe::recvAnysource(Tensors& tensors, int tag) {
  return wrap(inner("recv", tensors).recvAnysource(tensors, tag));
}

WorkPtr ProcessGroupAutoMoe::barrier(const c10d::BarrierOptions& options) {
  return wrap(inner("barrier", Tensors()).barrier(options));
}

void ProcessGroupAutoMoe::monitoredBarrier(
    const c10d::BarrierOptions& options, bool waitAllRanks) {
  inner("monitored_barrier", Tensors()).monitoredBarrier(options, waitAllRanks);
}

}  // namespace automoe
