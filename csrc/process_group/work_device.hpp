// SPDX-License-Identifier: Apache-2.0
// c10d's handle on a call whose work is on streams of a device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <memory>
#include <mutex>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>
#include <vector>

#include "process_group/exchange/device_exchange.hpp"

namespace automoe {

// By torch's generic interface: so nothing of its CUDA library is linked.

c10::Stream currentStreamOf(c10::Device device);
/// Whether what is enqueued on that is recorded into a graph.
bool isCapturing(c10::Device device);

/// An event on the current stream of a device.
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

/// When the inputs of a call are there that all ranks make. Where the device
/// has failed by then, the group does, too: so the others do not wait.
CurrentStreamEvent inputsReady(Group& group, c10::Device device);

/// What the current stream of the device does from now on comes after `event`.
void awaitOnCurrentStream(c10::Device device, Device::Event event);

/// The tensors of a call, held by its operation, until the engine and the
/// streams are done with them, and by its Work. Thread-safe.
class KeptTensors {
 public:
  explicit KeptTensors(std::vector<at::Tensor> tensors)
      : tensors_(std::move(tensors)) {}
  /// Leaves tensors to another thread: this one may be the engine's, which must
  /// not take the GIL.
  ~KeptTensors();
  KeptTensors(const KeptTensors&) = delete;
  KeptTensors& operator=(const KeptTensors&) = delete;

  /// Drops them for both holders.
  void drop();

 private:
  std::mutex mutex_;
  std::vector<at::Tensor> tensors_;
};

/// Callbacks that hold them.
OperationCallbacks keepingTensors(std::shared_ptr<KeptTensors> kept);

/// wait() orders the current stream after the call and returns: the host does
/// not wait, so its timeout means nothing. It throws what the call has failed
/// with by then. Of outputs of a call that fails later the values are not
/// defined, and the next call on the group throws.
class WorkDevice final : public c10d::Work {
 public:
  /// Made on the stream that is current where the call was posted. A wait()
  /// there drops `kept`, as from then on the order of that stream protects
  /// them; without one, they are held as long as this and the operation: of a
  /// call that is captured, the operation lets go before its graph is run.
  WorkDevice(
      int rank,
      c10::Device device,
      std::shared_ptr<Device> onDevice,
      DeviceExchange::Call call,
      std::vector<at::Tensor> outputs,
      std::shared_ptr<KeptTensors> kept);

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
  const c10::Stream posted_;
  const std::shared_ptr<KeptTensors> kept_;
};

}  // namespace automoe
