// SPDX-License-Identifier: Apache-2.0
// A collective of the inner group, ended by our group's failure too.
#pragma once

#include <functional>
#include <memory>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "process_group/exchange/group.hpp"

namespace automoe {

/// Gloo names nobody when a rank is gone, and a rank without a connection to
/// it waits for Gloo's own timeout. The engine knows: a wait here ends with
/// the group's failure.
class InnerWork final : public c10d::Work {
 public:
  /// `polled`: wait() may be called again after it timed out (not so for
  /// Gloo's send and recv, which give up their connection).
  InnerWork(
      c10::intrusive_ptr<c10d::Work> work,
      std::shared_ptr<Engine> engine,
      std::shared_ptr<Group> group,
      bool polled);

  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  int sourceRank() const override;
  std::vector<at::Tensor> result() override;
  void synchronize() override;
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void abort() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  float getDuration() const override;
  uint64_t getSequencenumber() const override;

 private:
  [[noreturn]] void throwNamed(std::exception_ptr error);

  c10::intrusive_ptr<c10d::Work> work_;
  // The group refers to the engine.
  std::shared_ptr<Engine> engine_;
  std::shared_ptr<Group> group_;
  const bool polled_;
};

}  // namespace automoe
