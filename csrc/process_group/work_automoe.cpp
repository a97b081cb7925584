// SPDX-License-Identifier: Apache-2.0
#include "process_group/work_automoe.hpp"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>

#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/pairs.hpp"

namespace automoe {

void throwForTorch(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const InvalidArgument& it) {
    C10_THROW_ERROR(ValueError, it.what());
  } catch (const Error& it) {
    C10_THROW_ERROR(DistBackendError, it.what());
  }
}

namespace {

// A process that ends with an error may be gone before its dump is written.
constexpr auto kDumpTime = std::chrono::seconds(5);

std::exception_ptr forTorch(const std::exception_ptr& error) {
  try {
    throwForTorch(error);
  } catch (...) {
    return std::current_exception();
  }
}

}  // namespace

void dumpFlightRecord(int globalRank) {
  FlightRecorder::instance().dumpOnFailure(globalRank);
  FlightRecorder::instance().waitForDump(kDumpTime);
}

// ---- OperationTensors ----

OperationCallbacks OperationTensors::callbacks() {
  OperationCallbacks callbacks;
  if (!standIns_.empty()) {
    callbacks.completing = [this] { copyStandIns(); };
  }
  callbacks.finished = [this] { ended(); };
  callbacks.released = [this] { releaseByEngine(); };
  return callbacks;
}

void OperationTensors::copyStandIns() {
  const at::AutoDispatchBelowADInplaceOrView below;
  for (const StandIn& it : standIns_) {
    it.to.copy_(it.from);
  }
}

void OperationTensors::setOperation(std::shared_ptr<Operation> operation) {
  const std::lock_guard lock(mutex_);
  operation_ = std::move(operation);
  if (ended_) {
    report();  // it ended while it was posted
  }
}

// With the mutex, once it has ended and the operation is set.
void OperationTensors::report() {
  const bool failed = operation_->error() != nullptr;
  record_.end(!failed);
  if (failed) {
    FlightRecorder::instance().dumpOnFailure(globalRank_);
  }
  if (!afterwards_) {
    return;
  }
  owners_.fetch_add(1);  // the task's
  const auto call = [this] {
    afterwards_(*operation_);
    releaseByCaller();
  };
  CompletionThread::instance().run(call, true);
}

c10::intrusive_ptr<c10::ivalue::Future> OperationTensors::future() {
  c10::intrusive_ptr<c10::ivalue::Future> made;
  {
    const std::lock_guard lock(mutex_);
    if (future_ != nullptr) {
      return future_;
    }
    future_ = c10::make_intrusive<c10::ivalue::Future>(
        c10::ListType::create(c10::TensorType::get()));
    made = future_;
    if (!ended_) {
      return made;
    }
  }
  completeFuture(made);
  return made;
}

void OperationTensors::ended() {
  const std::lock_guard lock(mutex_);
  ended_ = true;
  if (operation_ != nullptr) {
    report();
  }
  if (future_ == nullptr) {
    return;
  }
  owners_.fetch_add(1);  // the task's
  const auto complete = [this] {
    completeFuture(future_);
    releaseByCaller();
  };
  CompletionThread::instance().run(complete, true);
}

void OperationTensors::completeFuture(
    const c10::intrusive_ptr<c10::ivalue::Future>& future) {
  std::shared_ptr<Operation> operation;
  {
    const std::lock_guard lock(mutex_);
    operation = operation_;
  }
  if (operation != nullptr && operation->error() != nullptr) {
    future->setError(forTorch(operation->error()));
  } else {
    future->markCompleted(c10::IValue(outputs_));
  }
}

void OperationTensors::releaseByCaller() {
  if (owners_.fetch_sub(1) == 1) {
    delete this;
  }
}

void OperationTensors::releaseByEngine() {
  if (owners_.fetch_sub(1) == 1) {
    CompletionThread::instance().run([this] { delete this; });
  }
}

// ---- WorkAutoMoe ----

WorkAutoMoe::WorkAutoMoe(
    int rank,
    c10d::OpType type,
    const char* title,
    const std::optional<std::vector<at::Tensor>>& inputs,
    std::shared_ptr<Engine> engine,
    OperationTensors* tensors)
    : Work(rank, type, title, inputs),
      engine_(std::move(engine)),
      tensors_(tensors) {}

WorkAutoMoe::~WorkAutoMoe() {
  endProfilerRange();
  tensors_->releaseByCaller();
}

void WorkAutoMoe::endProfilerRange() {
  const std::lock_guard lock(mutex_);
  if (recordFunctionEndCallback_) {
    recordFunctionEndCallback_();
    recordFunctionEndCallback_ = nullptr;
  }
}

bool WorkAutoMoe::isCompleted() {
  return tensors_->operation()->finished();
}

bool WorkAutoMoe::isSuccess() const {
  const Operation& operation = *tensors_->operation();
  return operation.finished() && operation.error() == nullptr;
}

std::exception_ptr WorkAutoMoe::exception() const {
  const Operation& operation = *tensors_->operation();
  if (!operation.finished() || operation.error() == nullptr) {
    return nullptr;
  }
  return forTorch(operation.error());
}

int WorkAutoMoe::sourceRank() const {
  const auto* pair =
      dynamic_cast<const PairOperation*>(tensors_->operation().get());
  TORCH_CHECK(
      pair != nullptr && pair->finished(),
      "source_rank: only a receive that has ended has one");
  return pair->peer();
}

std::vector<at::Tensor> WorkAutoMoe::result() {
  return tensors_->outputs();
}

void WorkAutoMoe::synchronize() {
  wait();
}

bool WorkAutoMoe::wait(std::chrono::milliseconds timeout) {
  const Operation& operation = *tensors_->operation();
  // The operation has a deadline of its own and ends by then.
  const auto until = timeout == kNoTimeout ? Operation::Clock::time_point::max()
                                           : Operation::Clock::now() + timeout;
  if (!engine_->wait(operation, until)) {
    C10_THROW_ERROR(
        DistBackendError,
        c10::str(
            "wait: ",
            c10d::opTypeToString(opType_),
            " number ",
            operation.sequence(),
            " did not end within ",
            timeout.count(),
            " ms: ",
            engine_->waitsFor(operation)));
  }
  endProfilerRange();
  if (operation.error() != nullptr) {
    FlightRecorder::instance().waitForDump(kDumpTime);
    throwForTorch(operation.error());
  }
  return true;
}

c10::intrusive_ptr<c10::ivalue::Future> WorkAutoMoe::getFuture() {
  return tensors_->future();
}

float WorkAutoMoe::getDuration() const {
  const Operation& operation = *tensors_->operation();
  TORCH_CHECK(operation.finished(), "get_duration: the work has not ended");
  return std::chrono::duration<float, std::milli>(
             operation.ended() - operation.begun())
      .count();
}

uint64_t WorkAutoMoe::getSequencenumber() const {
  return tensors_->operation()->sequence();
}

// ---- CompletionThread ----

CompletionThread& CompletionThread::instance() {
  // Leaked: works may be dropped while the process exits.
  static auto* thread = new CompletionThread();
  return *thread;
}

void CompletionThread::run(std::function<void()> task, bool calls) {
  const std::lock_guard lock(mutex_);
  tasks_.push_back({std::move(task), calls});
  if (free_ == 0) {
    start();
  }
  changed_.notify_all();  // stop() may wait too
}

// With the mutex.
void CompletionThread::start() {
  threads_ += 1;
  free_ += 1;
  std::thread([this] { main(); }).detach();
}

void CompletionThread::main() {
  std::unique_lock lock(mutex_);
  while (!tasks_.empty() || (!stop_ && free_ == 1)) {
    if (tasks_.empty()) {
      changed_.wait(lock);
      continue;
    }
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    free_ -= task.calls ? 1 : 0;
    if (free_ == 0 && !tasks_.empty()) {
      start();
    }
    lock.unlock();
    task.run();
    const bool called = task.calls;
    task = {};  // what it holds is dropped without the mutex
    lock.lock();
    free_ += called ? 1 : 0;
  }
  free_ -= 1;
  threads_ -= 1;
  changed_.notify_all();
}

void CompletionThread::stop() {
  constexpr auto kLongest = std::chrono::seconds(5);
  std::unique_lock lock(mutex_);
  stop_ = true;
  changed_.notify_all();
  changed_.wait_for(lock, kLongest, [this] { return threads_ == 0; });
  stop_ = false;
}

void CompletionThread::forked() {
  threads_ = free_ = 0;
}

}  // namespace automoe
