// SPDX-License-Identifier: Apache-2.0
// One collective call on its way from tensors to bytes.
#pragma once

#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "process_group/exchange/scheduled.hpp"
#include "process_group/exchange/schedules.hpp"
#include "process_group/work_automoe.hpp"

namespace automoe {

/// What a call posts, and the tensors that it reads and writes: as they are
/// where they are contiguous, else copies and stand-ins. Checks as it goes;
/// errors are ValueErrors that begin with the name of the call.
class CollectiveCall {
 public:
  using Tensors = std::vector<at::Tensor>;

  /// The title is "automoe:" and the name of the call.
  CollectiveCall(
      const char* title,
      c10d::OpType type,
      OperationKind kind,
      std::chrono::milliseconds timeout);

  /// A tensor to read. `converted` is what is read in its place.
  ConstBlock input(const at::Tensor& tensor);
  ConstBlock input(const at::Tensor& tensor, const at::Tensor& converted);
  /// A tensor to write; what it holds before is not read.
  Block output(const at::Tensor& tensor);
  /// A tensor of which some ranks read and others write, or which is both.
  Block inPlace(const at::Tensor& tensor);
  /// Outputs side by side in one tensor, which is split at the end, for lists
  /// whose tensors may be the same.
  std::vector<Block> outputs(const Tensors& tensors);
  /// All elements of several tensors of one dtype, one after the other.
  at::Tensor pack(const Tensors& tensors);
  /// Memory for such elements; what is written there comes to the tensors at
  /// the end.
  Block packed(const Tensors& tensors);
  /// Memory of a tensor that is not the caller's.
  ConstBlock keep(const at::Tensor& tensor);

  /// Sets how the ranks' tensors are summed, and their dtype; returns what to
  /// read of `tensor`: it may have to be scaled before.
  at::Tensor setReduction(
      const c10d::ReduceOp& operation, const at::Tensor& tensor, int size);
  /// What ranks have to agree on beside the kind.
  void describe(const at::Tensor& like, int root, uint64_t totalBytes);
  void setSchedule(Schedule schedule) { schedule_ = std::move(schedule); }
  void checkSameType(const at::Tensor& tensor, const at::Tensor& like) const;
  void checkSameSize(const at::Tensor& tensor, const at::Tensor& like) const;

  const char* title() const { return title_; }
  const char* name() const { return name_; }
  c10d::OpType type() const { return type_; }
  std::chrono::milliseconds timeout() const { return timeout_; }
  const kernels::Reduction& reduction() const { return reduction_; }
  const Tensors& inputs() const { return inputs_; }
  const Tensors& outputs() const { return outputs_; }

  ScheduledArguments takeArguments();
  /// With all tensors; who calls owns the Work's share.
  OperationTensors* takeTensors();

 private:
  void checkLayout(const at::Tensor& tensor) const;
  Block standIn(const at::Tensor& tensor, bool filled);

  const char* title_;
  const char* name_;
  c10d::OpType type_;
  std::chrono::milliseconds timeout_;
  MessageDescription description_;
  kernels::Reduction reduction_;
  Schedule schedule_;
  Tensors inputs_;   // the caller's
  Tensors outputs_;  // the caller's
  Tensors kept_;
  std::vector<StandIn> standIns_;
};

/// "SUM", "PREMUL_SUM", ...; "?" for a number that is no operation.
const char* reduceOpName(uint8_t operation);
/// As torch calls it.
const char* dtypeName(uint8_t dtype);

}  // namespace automoe
