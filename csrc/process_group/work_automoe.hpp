// SPDX-License-Identifier: Apache-2.0
// c10d's handle on an operation of the core, and who keeps its tensors.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "process_group/exchange/engine.hpp"
#include "process_group/flight_recorder.hpp"

namespace automoe {

/// Rethrows an error of the core as the type that Python users expect:
/// ValueError for arguments, torch.distributed.DistBackendError otherwise.
[[noreturn]] void throwForTorch(const std::exception_ptr& error);

/// Where that is asked for, a file with what was posted lately; waits for it a
/// while, since the process may end with the error.
void dumpFlightRecord(int globalRank);

/// A tensor whose layout the core does not write: `from` stands in for it, and
/// is copied to it at the end.
struct StandIn {
  at::Tensor to;
  at::Tensor from;
};

/// Tensors of one operation and its future. Two own it, the Work and the
/// engine; whoever is last deletes it, but never the engine's thread, which
/// must not take the GIL: it leaves that to the completion thread.
class OperationTensors {
 public:
  OperationTensors(
      std::vector<at::Tensor> inputs,
      std::vector<at::Tensor> outputs,
      std::vector<StandIn> standIns = {})
      : inputs_(std::move(inputs)),
        outputs_(std::move(outputs)),
        standIns_(std::move(standIns)) {}

  const std::vector<at::Tensor>& outputs() const { return outputs_; }
  /// Completes when the operation has ended; made at the first call.
  c10::intrusive_ptr<c10::ivalue::Future> future();

  /// Runs at the end, on the completion thread; before callbacks().
  void setAfterwards(std::function<void(const Operation&)> afterwards) {
    afterwards_ = std::move(afterwards);
  }
  /// What its end is written to, and the rank for a dump if it fails; before
  /// setOperation().
  void setRecord(const FlightRecord& record, int globalRank) {
    record_ = record;
    globalRank_ = globalRank;
  }
  /// For OperationCallbacks; the operation is set before either can run.
  OperationCallbacks callbacks();
  void setOperation(std::shared_ptr<Operation> operation);
  const std::shared_ptr<Operation>& operation() const { return operation_; }

  /// The Work's side is done. Deletes this if the engine's is too.
  void releaseByCaller();

 private:
  ~OperationTensors() = default;

  void copyStandIns();
  void report();
  void ended();
  void completeFuture(const c10::intrusive_ptr<c10::ivalue::Future>& future);
  void releaseByEngine();

  std::vector<at::Tensor> inputs_;
  std::vector<at::Tensor> outputs_;
  std::vector<StandIn> standIns_;
  std::function<void(const Operation&)> afterwards_;
  FlightRecord record_;
  int globalRank_ = 0;
  std::atomic<int> owners_{2};
  std::mutex mutex_;
  bool ended_ = false;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
  std::shared_ptr<Operation> operation_;
};

/// Completes without wait(). wait() blocks, drives the engine, and throws the
/// operation's error; a timeout of its own that passes first is an error too,
/// but leaves the operation running.
class WorkAutoMoe final : public c10d::Work {
 public:
  /// Takes over the Work's share of `tensors`.
  WorkAutoMoe(
      int rank,
      c10d::OpType type,
      const char* title,
      const std::optional<std::vector<at::Tensor>>& inputs,
      std::shared_ptr<Engine> engine,
      OperationTensors* tensors);
  ~WorkAutoMoe() override;

  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  /// Of a receive: whose message it was, in the group.
  int sourceRank() const override;
  std::vector<at::Tensor> result() override;
  void synchronize() override;
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  /// In milliseconds, from the call to the end.
  float getDuration() const override;
  uint64_t getSequencenumber() const override;

 private:
  void endProfilerRange();

  std::shared_ptr<Engine> engine_;
  OperationTensors* tensors_;
};

/// Runs what must not run on the engine's thread: dropping tensors of works
/// that nobody holds, and completing futures, whose callbacks may be Python. A
/// callback may wait for another future; so there is one more thread while all
/// are in callbacks.
class CompletionThread {
 public:
  static CompletionThread& instance();

  /// `calls`: the task calls code of the user's.
  void run(std::function<void()> task, bool calls = false);
  /// Finishes what is queued and ends the threads, but for those whose callback
  /// does not return within a few seconds; they start again if needed.
  void stop();
  /// After fork(), in the child: the threads do not exist there.
  void forked();

 private:
  struct Task {
    std::function<void()> run;
    bool calls;
  };

  void start();
  void main();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  bool stop_ = false;
  int threads_ = 0;
  int free_ = 0;  // threads that are not in code of the user's
};

}  // namespace automoe
