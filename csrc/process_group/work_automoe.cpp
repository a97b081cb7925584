// SPDX-License-Identifier: Apache-2.0
#include "process_group/work_automoe.hpp"

#include <ATen/core/ivalue.h>
#include <c10/util/Exception.h>

#include <utility>

#include "process_group/common/error.hpp"

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

std::exception_ptr forTorch(const std::exception_ptr& error) {
  try {
    throwForTorch(error);
  } catch (...) {
    return std::current_exception();
  }
}

}  // namespace

// ---- OperationTensors ----

OperationCallbacks OperationTensors::callbacks() {
  OperationCallbacks callbacks;
  callbacks.finished = [this] { ended(); };
  callbacks.released = [this] { releaseByEngine(); };
  return callbacks;
}

void OperationTensors::setOperation(std::shared_ptr<Operation> operation) {
  const std::lock_guard lock(mutex_);
  operation_ = std::move(operation);
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
  if (future_ == nullptr) {
    return;
  }
  owners_.fetch_add(1);  // the task's
  CompletionThread::instance().run([this] {
    completeFuture(future_);
    releaseByCaller();
  });
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
    throwForTorch(operation.error());
  }
  return true;
}

c10::intrusive_ptr<c10::ivalue::Future> WorkAutoMoe::getFuture() {
  return tensors_->future();
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

void CompletionThread::run(std::function<void()> task) {
  const std::lock_guard lock(mutex_);
  tasks_.push_back(std::move(task));
  if (!thread_.joinable()) {
    stop_ = false;
    thread_ = std::thread([this] { main(); });
  }
  changed_.notify_one();
}

void CompletionThread::main() {
  std::unique_lock lock(mutex_);
  while (!stop_ || !tasks_.empty()) {
    if (tasks_.empty()) {
      changed_.wait(lock);
      continue;
    }
    const auto tasks = std::exchange(tasks_, {});
    lock.unlock();
    for (const auto& task : tasks) {
      task();
    }
    lock.lock();
  }
}

void CompletionThread::stop() {
  std::thread thread;
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    changed_.notify_one();
    thread = std::move(thread_);
  }
  if (thread.joinable()) {
    thread.join();
  }
}

void CompletionThread::forked() {
  if (thread_.joinable()) {
    thread_.detach();
  }
}

}  // namespace automoe
