// SPDX-License-Identifier: Apache-2.0
// The c10d backend "automoe": where tensors become pointers.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "process_group/abort_hooks.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"
#include "process_group/exchange/schedules.hpp"
#include "process_group/options_automoe.hpp"
#include "process_group/work_automoe.hpp"

namespace automoe {

class CollectiveCall;

/// The engine of this process, made at the first call. In a forked child it
/// is dead and every use of it says so.
std::shared_ptr<Engine> processEngine();
/// Ends the engine of this process, if there is one, and the completion
/// thread: leaves all groups, at most `timeout` for node-mates to leave.
void shutdownProcess(std::chrono::milliseconds timeout);

/// Every collective on CPU tensors is the engine's; those on others go to
/// `inner`, an NCCL group over the same ranks where there is one. One object
/// serves CPU and CUDA maps of c10d.
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
      const std::string& name,
      const std::vector<int>& globalRanks,
      c10::intrusive_ptr<OptionsAutoMoe> options,
      c10::intrusive_ptr<c10d::Backend> inner = nullptr);
  ~ProcessGroupAutoMoe() override;

  const std::string getBackendName() const override { return kBackendName; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return options_; }
  c10::intrusive_ptr<OptionsAutoMoe> options() const { return options_; }
  bool supportsSplitting() const override { return true; }
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override;
  c10::intrusive_ptr<Work> endCoalescing() override;
  /// A group of some of these ranks; called by its members, or by all. Null
  /// for a rank that is not among them.
  c10::intrusive_ptr<Backend> split(
      const c10::intrusive_ptr<c10d::Store>& store,
      const std::vector<int>& ranks,
      const c10::intrusive_ptr<Options>& options) override;

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

  // collectives.cpp
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
  // point_to_point.cpp
  c10::intrusive_ptr<Work> send(
      Tensors& tensors, int destination, int tag) override;
  c10::intrusive_ptr<Work> recv(Tensors& tensors, int source, int tag) override;
  c10::intrusive_ptr<Work> recvAnysource(Tensors& tensors, int tag) override;
  c10::intrusive_ptr<Work> barrier(
      const c10d::BarrierOptions& options) override;
  void monitoredBarrier(
      const c10d::BarrierOptions& options, bool waitAllRanks) override;

  void setSequenceNumberForGroup() override {}
  /// Collectives called on this group so far, of every kind; messages between
  /// two ranks do not count, so that all ranks have the same number.
  uint64_t getSequenceNumberForGroup() override { return calls_; }
  void registerOnCompletionHook(
      std::function<void(std::shared_ptr<c10d::WorkInfo>)>&& hook) override;
  void waitForPendingWorks() override;
  /// Works always know their duration.
  void enableCollectivesTiming() override {}
#ifdef C10D_BACKEND_HAS_HOOKS  // torch 2.14
  void registerAbortHook(int64_t id, c10d::AbortHook hook) override {
    abortHooks_->add(id, std::move(hook));
  }
  void unregisterAbortHook(int64_t id) override { abortHooks_->remove(id); }
  c10::intrusive_ptr<Work> gather_into_tensor(
      at::Tensor& output,
      at::Tensor& input,
      const c10d::GatherOptions& options) override;
#endif
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
  /// What profilers and hooks are told of a call.
  struct CallInfo {
    c10d::OpType type;
    const char* title;
    Tensors inputs;
    Tensors outputs;
    std::vector<int64_t> inputSplits;
    std::vector<int64_t> outputSplits;
    int peer = -1;  // of a message; -1: any
  };
  using Start = std::function<std::shared_ptr<Operation>(OperationCallbacks)>;

  /// Posts by `start`, and makes the Work. Takes over `tensors`.
  c10::intrusive_ptr<Work> launch(
      OperationTensors* tensors, const CallInfo& call, const Start& start);
  c10::intrusive_ptr<Work> launchUnrecorded(
      OperationTensors* tensors, const CallInfo& call, const Start& start);
  c10::intrusive_ptr<Work> post(CollectiveCall call);
  /// Blocks that lie in `tensors`, which this takes over.
  c10::intrusive_ptr<Work> postAllToAll(
      AllToAllArguments arguments,
      OperationTensors* tensors,
      const CallInfo& call,
      const c10d::AllToAllOptions& options);
  c10::intrusive_ptr<Work> postAllGather(
      CollectiveCall call,
      const at::Tensor& like,
      ConstBlock from,
      const std::vector<Block>& to);
  c10::intrusive_ptr<Work> postPair(
      bool sends,
      const char* title,
      c10d::OpType type,
      Tensors& tensors,
      int peer,
      int tag);
  void passBarrierAsFirst(std::chrono::milliseconds timeout, bool waitAllRanks);
  std::shared_ptr<PairOperation> postMail(
      int peer, bool sends, std::chrono::milliseconds timeout);
  /// Throws errors of the core.
  void awaitMail(const std::shared_ptr<PairOperation>& operation);
  /// One call for each output and its input, as one work.
  c10::intrusive_ptr<Work> together(
      Tensors& outputs,
      Tensors& inputs,
      const std::function<c10::intrusive_ptr<Work>(size_t)>& one);
  int globalRankOf(int rank) const;
  int checkRoot(const char* call, int64_t root) const;
  std::chrono::milliseconds orDefault(std::chrono::milliseconds timeout) const;
  /// The inner group when the tensors are not on the CPU; else null.
  c10d::Backend* inner(const char* call, const Tensors& tensors);
  std::function<void(const Operation&)> completionTask(c10d::OpType type);

  std::shared_ptr<Engine> engine_;
  std::shared_ptr<Group> group_;
  c10::intrusive_ptr<c10d::Backend> inner_;
  c10::intrusive_ptr<OptionsAutoMoe> options_;
  const std::vector<int> globalRanks_;
  std::mutex coalescingMutex_;
  bool coalescing_ = false;
  std::vector<c10::intrusive_ptr<Work>> coalesced_;
  /// Calls of which the hook has not been told; shared with their tasks.
  struct Pending {
    std::mutex mutex;
    std::condition_variable changed;
    int count = 0;
  };
  const std::shared_ptr<Pending> pending_ = std::make_shared<Pending>();
  const std::shared_ptr<AbortHooks> abortHooks_ =
      std::make_shared<AbortHooks>();
  std::atomic<uint64_t> calls_{0};
  std::atomic<uint64_t> messages_{0};  // sent or received
  std::atomic<bool> left_{false};
};

}  // namespace automoe
