// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/host_staging.hpp"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <utility>

#include "moe_ops/tensors.hpp"

namespace automoe {

at::Tensor HostStaging::emptyOnHost(const at::Tensor& like) const {
  return at::empty(
      like.sizes(),
      at::TensorOptions(like.scalar_type()).pinned_memory(device_.is_cuda()));
}

at::Tensor HostStaging::toHost(const char* name, const at::Tensor& tensor) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const at::Tensor dense = denseOn(device_, call_, name, tensor);
  at::Tensor host = emptyOnHost(dense);
  host.copy_(dense, /*non_blocking=*/device_.is_cuda());
  pending_ = device_.is_cuda();
  return host;
}

std::optional<at::Tensor> HostStaging::toHost(
    const char* name, const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::optional(toHost(name, *tensor))
                            : std::nullopt;
}

std::vector<at::Tensor> HostStaging::toHost(
    const char* name, at::TensorList tensors) {
  std::vector<at::Tensor> hosts;
  for (const at::Tensor& tensor : tensors) {
    hosts.push_back(toHost(name, tensor));
  }
  return hosts;
}

void HostStaging::await() {
  if (pending_) {
    const c10::impl::VirtualGuardImpl guard(device_.type());
    guard.synchronizeStream(guard.getStream(device_));
    pending_ = false;
  }
}

at::Tensor HostStaging::toDevice(const at::Tensor& tensor) const {
  const at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor from = tensor;
  if (device_.is_cuda()) {
    // A copy from memory that is not page-locked would wait.
    from = emptyOnHost(tensor);
    from.copy_(tensor);
  }
  at::Tensor to = emptyOnDevice(tensor);
  to.copy_(from, /*non_blocking=*/device_.is_cuda());
  return to;
}

at::Tensor HostStaging::emptyOnDevice(const at::Tensor& tensor) const {
  const at::AutoDispatchBelowADInplaceOrView below;
  return at::empty(
      tensor.sizes(), at::TensorOptions(tensor.scalar_type()).device(device_));
}

// ---- StagedWork ----

StagedWork::StagedWork(
    c10::intrusive_ptr<c10d::Work> onHost,
    std::vector<at::Tensor> from,
    std::vector<at::Tensor> to)
    : Work(-1, c10d::OpType::ALLTOALL_BASE),
      onHost_(std::move(onHost)),
      from_(std::move(from)),
      to_(std::move(to)) {
  const c10::Device device = to_.front().device();
  if (device.is_cuda()) {
    posted_.emplace(device);
  }
}

bool StagedWork::isCompleted() {
  return onHost_->isCompleted();
}

bool StagedWork::isSuccess() const {
  return onHost_->isSuccess();
}

std::exception_ptr StagedWork::exception() const {
  return onHost_->exception();
}

std::vector<at::Tensor> StagedWork::result() {
  return to_;
}

void StagedWork::synchronize() {
  wait();
}

bool StagedWork::wait(std::chrono::milliseconds timeout) {
  onHost_->wait(timeout);
  const std::lock_guard lock(mutex_);
  const at::AutoDispatchBelowADInplaceOrView below;
  if (posted_.has_value() && !from_.empty()) {
    awaitOnCurrentStream(to_.front().device(), posted_->get());
  }
  for (size_t i = 0; i < from_.size(); ++i) {
    // Blocking, so that every stream may read it from now on.
    to_[i].copy_(from_[i]);
  }
  from_.clear();
  return true;
}

c10::intrusive_ptr<c10::ivalue::Future> StagedWork::getFuture() {
  wait();
  std::vector<c10::Device> devices;
  for (const at::Tensor& tensor : to_) {
    devices.assign(1, tensor.device());
  }
  auto future = c10::make_intrusive<c10::ivalue::Future>(
      c10::ListType::create(c10::TensorType::get()), devices);
  future->markCompleted(c10::IValue(to_));
  return future;
}

}  // namespace automoe
