// SPDX-License-Identifier: Apache-2.0
// c10d's handle on a call whose work is on streams of a device.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <mutex>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "process_group/exchange/device_exchange.hpp"

namespace automoe {

/// An event on the current stream of a device, by torch's generic interface: so
/// nothing of torch's CUDA library is linked.
class CurrentStreamEvent {
 public:
  explicit CurrentStreamEvent(c10::Device device);
  ~CurrentStreamEvent();
  CurrentStreamEvent(const CurrentStreamEvent&) = delete;
  CurrentStreamEvent& operator=(const CurrentStreamEvent&) = delete;

  Device::Event get() const { return static_cast<Device::Event>(event_); }

 private:
  c10::Device device_;
  void* event_ = nullptr;
};

/// What the current stream of the device does from now on comes after `event`.
void awaitOnCurrentStream(c10::Device device, Device::Event event);

/// Callbacks that keep tensors until the engine and the streams are done with
/// them. They are not dropped on the engine's thread, which must not take the
/// GIL.
OperationCallbacks keepingTensors(std::vector<at::Tensor> tensors);

/// wait() orders the current stream after the call and returns: the host does
/// not wait, so its timeout means nothing. It throws what the call has failed
/// with by then. Of outputs of a call that fails later the values are not
/// defined, and the next call on the group throws.
class WorkDevice final : public c10d::Work {
 public:
  /// `kept` are held until wait(), from where on the order of streams protects
  /// them: where the call is captured, its operation lets them go before.
  WorkDevice(
      int rank,
      c10::Device device,
      std::shared_ptr<Device> onDevice,
      DeviceExchange::Call call,
      std::vector<at::Tensor> outputs,
      std::vector<at::Tensor> kept);

  /// The outputs are there, or the call has failed.
  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  std::vector<at::Tensor> result() override;
  void synchronize() override;
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  /// Has completed; who takes its value has his stream ordered after the call.
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  uint64_t getSequencenumber() const override;

 private:
  const c10::Device device_;
  const std::shared_ptr<Device> onDevice_;
  const DeviceExchange::Call call_;
  const std::vector<at::Tensor> outputs_;
  std::mutex mutex_;
  std::vector<at::Tensor> kept_;
};

}  // namespace automoe
