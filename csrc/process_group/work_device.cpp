// SPDX-License-Identifier: Apache-2.0
#include "process_group/work_device.hpp"

#include <ATen/core/ivalue.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <utility>

#include "process_group/device/cuda_device.hpp"
#include "process_group/work_automoe.hpp"

namespace automoe {

c10::Stream currentStreamOf(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return guard.getStream(device);
}

bool isCapturing(c10::Device device) {
  return device.is_cuda() && isCapturingCuda(static_cast<Device::Stream>(
                                 currentStreamOf(device).native_handle()));
}

CurrentStreamEvent::CurrentStreamEvent(c10::Device device) : device_(device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  guard.record(
      &event_,
      guard.getStream(device),
      device.index(),
      c10::EventFlag::PYTORCH_DEFAULT);
}

CurrentStreamEvent::~CurrentStreamEvent() {
  const c10::impl::VirtualGuardImpl guard(device_.type());
  guard.destroyEvent(event_, device_.index());
}

CurrentStreamEvent inputsReady(Group& group, c10::Device device) {
  try {
    return CurrentStreamEvent(device);
  } catch (const c10::Error& error) {
    group.abort(error.what_without_backtrace());
    throw;
  }
}

void awaitOnCurrentStream(c10::Device device, Device::Event event) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  guard.block(event, guard.getStream(device));
}

KeptTensors::~KeptTensors() {
  if (!tensors_.empty()) {
    CompletionThread::instance().run(
        [tensors = std::move(tensors_)]() mutable { tensors.clear(); });
  }
}

void KeptTensors::drop() {
  std::vector<at::Tensor> dropped;
  {
    // Not while it is locked: dropping may take the GIL.
    const std::lock_guard lock(mutex_);
    dropped = std::exchange(tensors_, {});
  }
}

OperationCallbacks keepingTensors(std::shared_ptr<KeptTensors> kept) {
  OperationCallbacks callbacks;
  callbacks.released = [kept = std::move(kept)]() mutable { kept.reset(); };
  return callbacks;
}

WorkDevice::WorkDevice(
    int rank,
    c10::Device device,
    std::shared_ptr<Device> onDevice,
    DeviceExchange::Call call,
    std::vector<at::Tensor> outputs,
    std::shared_ptr<KeptTensors> kept)
    : Work(rank, c10d::OpType::ALLTOALL_BASE),
      device_(device),
      onDevice_(std::move(onDevice)),
      call_(std::move(call)),
      outputs_(std::move(outputs)),
      posted_(currentStreamOf(device)),
      kept_(std::move(kept)) {}

bool WorkDevice::isCompleted() {
  try {
    return call_.operation->finished() ||
           (!call_.captured && onDevice_->happened(call_.done->get()));
  } catch (const DeviceError&) {
    return true;  // the device does nothing any more
  }
}

bool WorkDevice::isSuccess() const {
  const Operation& operation = *call_.operation;
  try {
    return operation.finished()
               ? operation.error() == nullptr
               : !call_.captured && onDevice_->happened(call_.done->get());
  } catch (const DeviceError&) {
    return false;
  }
}

std::exception_ptr WorkDevice::exception() const {
  const Operation& operation = *call_.operation;
  if (!operation.finished() || operation.error() == nullptr) {
    return nullptr;
  }
  try {
    throwForTorch(operation.error());
  } catch (...) {
    return std::current_exception();
  }
}

std::vector<at::Tensor> WorkDevice::result() {
  return outputs_;
}

void WorkDevice::synchronize() {
  wait();
}

bool WorkDevice::wait(std::chrono::milliseconds /*timeout*/) {
  const Operation& operation = *call_.operation;
  if (operation.finished() && operation.error() != nullptr) {
    throwForTorch(operation.error());
  }
  awaitOnCurrentStream(device_, call_.done->get());
  if (currentStreamOf(device_) == posted_) {
    kept_->drop();
  }
  return true;
}

c10::intrusive_ptr<c10::ivalue::Future> WorkDevice::getFuture() {
  wait();
  auto future = c10::make_intrusive<c10::ivalue::Future>(
      c10::ListType::create(c10::TensorType::get()),
      std::vector<c10::Device>{device_});
  future->markCompleted(c10::IValue(outputs_));
  return future;
}

uint64_t WorkDevice::getSequencenumber() const {
  return call_.operation->sequence();
}

}  // namespace automoe
