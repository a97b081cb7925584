// SPDX-License-Identifier: Apache-2.0
// Plans and rows over any c10d process group with all_to_all_single.
#pragma once

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "moe_ops/row_exchange.hpp"
#include "process_group/exchange/record.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe {

/// Every rank is a node by itself. A call is two all_to_alls: one of a fixed
/// size that tells what each rank has in mind, so that all find the same
/// fault, then the bytes. Both have ended when a call returns.
class AllToAllExchange final : public RowExchange {
 public:
  explicit AllToAllExchange(c10::intrusive_ptr<c10d::ProcessGroup> group);

  const Topology& topology() const override { return topology_; }
  void checkRoute(const Route& route) const override;
  void plan(const std::shared_ptr<RouteBuilder>& builder, CallTensors tensors)
      override;
  WorkPointer dispatch(
      DispatchArguments arguments, CallTensors tensors) override;
  WorkPointer combine(CombineArguments arguments, CallTensors tensors) override;
  void refuse(OperationKind kind, const std::string& fault) override;

 private:
  struct Greeting;

  /// Tells every rank `own` with the bytes that will follow; returns how many
  /// come from each rank. Throws where ranks disagree.
  std::vector<int64_t> greet(
      const Greeting& own, const std::vector<int64_t>& sendBytes);
  at::Tensor exchange(
      at::Tensor send,
      std::vector<int64_t> sendBytes,
      std::vector<int64_t> receiveBytes);
  WorkPointer finished(CallTensors tensors) const;

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  Topology topology_;
};

}  // namespace automoe
