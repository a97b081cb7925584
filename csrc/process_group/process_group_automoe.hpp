// SPDX-License-Identifier: Apache-2.0
// The c10d backend "automoe": where tensors become pointers.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {

constexpr const char* kBackendName = "automoe";

/// The engine of this process, made at the first call. In a forked child it
/// is dead and every use of it says so.
std::shared_ptr<Engine> processEngine();
/// Ends the engine of this process, if there is one, and the completion
/// thread: leaves all groups, at most `timeout` for node-mates to leave.
void shutdownProcess(std::chrono::milliseconds timeout);

/// all_to_all_single and all_to_all are ours; every other collective goes to
/// `inner`, a Gloo group over the same ranks. One object serves CPU and CUDA
/// maps of c10d; tensors must be on the CPU.
class ProcessGroupAutoMoe final : public c10d::Backend {
 public:
  using Work = c10d::Work;
  using Tensors = std::vector<at::Tensor>;
  using TensorLists = std::vector<std::vector<at::Tensor>>;

  /// Collective over all ranks of the group.
  ProcessGroupAutoMoe(
      const c10::intrusive_ptr<c10d::Store>& store,
      int rank,
      int size,
      std::chrono::milliseconds timeout,
      const std::string& name,
      const std::vector<int>& globalRanks,
      c10::intrusive_ptr<c10d::Backend> inner);
  ~ProcessGroupAutoMoe() override;

  const std::string getBackendName() const override { return kBackendName; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return options_; }

  c10::intrusive_ptr<Work> alltoall_base(
      at::Tensor& output,
      at::Tensor& input,
      std::vector<int64_t>& outputSplitSizes,
      std::vector<int64_t>& inputSplitSizes,
      const c10d::AllToAllOptions& options) override;
  c10::intrusive_ptr<Work> alltoall(
      Tensors& outputs,
      Tensors& inputs,
      const c10d::AllToAllOptions& options) override;

  // By the inner group.
  c10::intrusive_ptr<Work> broadcast(
      Tensors& tensors, const c10d::BroadcastOptions& options) override;
  c10::intrusive_ptr<Work> allreduce(
      Tensors& tensors, const c10d::AllreduceOptions& options) override;
  c10::intrusive_ptr<Work> allreduce_sparse(
      Tensors& tensors, const c10d::AllreduceOptions& options) override;
  c10::intrusive_ptr<Work> allreduce_coalesced(
      Tensors& tensors,
      const c10d::AllreduceCoalescedOptions& options) override;
  c10::intrusive_ptr<Work> reduce(
      Tensors& tensors, const c10d::ReduceOptions& options) override;
  c10::intrusive_ptr<Work> allgather(
      TensorLists& outputs,
      Tensors& inputs,
      const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<Work> _allgather_base(
      at::Tensor& output,
      at::Tensor& input,
      const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<Work> allgather_coalesced(
      TensorLists& outputs,
      Tensors& inputs,
      const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<Work> allgather_into_tensor_coalesced(
      Tensors& outputs,
      Tensors& inputs,
      const c10d::AllgatherOptions& options) override;
  c10::intrusive_ptr<Work> gather(
      TensorLists& outputs,
      Tensors& inputs,
      const c10d::GatherOptions& options) override;
  c10::intrusive_ptr<Work> scatter(
      Tensors& outputs,
      TensorLists& inputs,
      const c10d::ScatterOptions& options) override;
  c10::intrusive_ptr<Work> reduce_scatter(
      Tensors& outputs,
      TensorLists& inputs,
      const c10d::ReduceScatterOptions& options) override;
  c10::intrusive_ptr<Work> _reduce_scatter_base(
      at::Tensor& output,
      at::Tensor& input,
      const c10d::ReduceScatterOptions& options) override;
  c10::intrusive_ptr<Work> reduce_scatter_tensor_coalesced(
      Tensors& outputs,
      Tensors& inputs,
      const c10d::ReduceScatterOptions& options) override;
  c10::intrusive_ptr<Work> send(
      Tensors& tensors, int destination, int tag) override;
  c10::intrusive_ptr<Work> recv(Tensors& tensors, int source, int tag) override;
  c10::intrusive_ptr<Work> recvAnysource(Tensors& tensors, int tag) override;
  c10::intrusive_ptr<Work> barrier(
      const c10d::BarrierOptions& options) override;
  void monitoredBarrier(
      const c10d::BarrierOptions& options, bool waitAllRanks) override;

  void setSequenceNumberForGroup() override {}
  /// Collectives called on this group so far, of every kind.
  uint64_t getSequenceNumberForGroup() override { return calls_; }
  void setTimeout(std::chrono::milliseconds timeout) override;
  void abort() override;
  /// Waits for pending operations (at most 10 s), then leaves. Idempotent.
  void shutdown() override;
  c10d::ErrorType getError() override;

  /// Which exchange was used and why, in words.
  std::string explainExchange();
  std::map<std::string, int64_t> stats();
  const Topology& topology() const { return group_->topology(); }

 private:
  /// Posts blocks that lie in `tensors`, which this takes over.
  c10::intrusive_ptr<Work> post(
      AllToAllArguments arguments,
      Tensors inputs,
      Tensors outputs,
      c10d::OpType type,
      std::chrono::milliseconds timeout);
  /// The inner group, for a collective on `tensors`.
  c10d::Backend& inner(const char* collective, const Tensors& tensors);
  /// What the inner group returned, with our failure's text if it fails too.
  c10::intrusive_ptr<Work> wrap(c10::intrusive_ptr<Work> work);

  std::shared_ptr<Engine> engine_;
  std::shared_ptr<Group> group_;
  c10::intrusive_ptr<c10d::Backend> inner_;
  c10::intrusive_ptr<Options> options_;
  std::atomic<uint64_t> calls_{0};
  std::atomic<bool> left_{false};
};

}  // namespace automoe
