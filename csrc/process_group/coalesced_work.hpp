// SPDX-License-Identifier: Apache-2.0
// Several works as one.
#pragma once

#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

namespace automoe {

/// Has ended when all have; its error is that of the first that has one.
class CoalescedWork final : public c10d::Work {
 public:
  CoalescedWork(int rank, std::vector<c10::intrusive_ptr<c10d::Work>> works);

  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  std::vector<at::Tensor> result() override;
  void synchronize() override;
  /// `timeout` is for all together.
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;

 private:
  std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

}  // namespace automoe
