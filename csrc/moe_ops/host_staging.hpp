// SPDX-License-Identifier: Apache-2.0
// Tensors of a device by way of the host, for operators that run on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include <mutex>
#include <optional>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "process_group/work_device.hpp"

namespace automoe {

/// Copies of one call, on the current stream of the device; the host's side is
/// page-locked where the device is a CUDA device.
class HostStaging {
 public:
  HostStaging(const char* call, c10::Device device)
      : call_(call), device_(device) {}

  /// Enqueues the copy; its values are there after await(). ValueError for a
  /// tensor that is not dense and on the device.
  at::Tensor toHost(const char* name, const at::Tensor& tensor);
  std::optional<at::Tensor> toHost(
      const char* name, const std::optional<at::Tensor>& tensor);
  std::vector<at::Tensor> toHost(const char* name, at::TensorList tensors);
  /// The host waits.
  void await();

  /// Enqueues the copy; the host does not wait.
  at::Tensor toDevice(const at::Tensor& tensor) const;
  /// A new tensor of the device that will have the values of this one.
  at::Tensor emptyOnDevice(const at::Tensor& tensor) const;

 private:
  at::Tensor emptyOnHost(const at::Tensor& like) const;

  const char* call_;
  c10::Device device_;
  bool pending_ = false;
};

/// A call on tensors of the host whose results belong on a device: they are
/// copied there by the first wait(), which blocks. Who drops it without has no
/// results. Made on the stream that `to` belongs to.
class StagedWork final : public c10d::Work {
 public:
  StagedWork(
      c10::intrusive_ptr<c10d::Work> onHost,
      std::vector<at::Tensor> from,
      std::vector<at::Tensor> to);

  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  std::vector<at::Tensor> result() override;
  void synchronize() override;
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  /// Waits, and has completed.
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;

 private:
  const c10::intrusive_ptr<c10d::Work> onHost_;
  std::mutex mutex_;
  std::vector<at::Tensor> from_;  // empty once copied
  const std::vector<at::Tensor> to_;
  /// What used the memory of `to` before comes before it; of CUDA devices.
  std::optional<CurrentStreamEvent> posted_;
};

}  // namespace automoe
