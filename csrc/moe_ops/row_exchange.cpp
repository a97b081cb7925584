// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/row_exchange.hpp"

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <utility>

#include "moe_ops/all_to_all_exchange.hpp"
#include "moe_ops/tensors.hpp"
#include "process_group/group_registry.hpp"
#include "process_group/work_automoe.hpp"

namespace automoe {
namespace {

/// By the engine of this process.
class CoreExchange final : public RowExchange {
 public:
  explicit CoreExchange(RegisteredGroup group) : group_(std::move(group)) {}

  const Topology& topology() const override { return group_.group->topology(); }

  void checkRoute(const Route& route) const override {
    group_.group->checkRoute(route);
  }

  void plan(const std::shared_ptr<RouteBuilder>& builder, CallTensors tensors)
      override {
    post("automoe:plan", std::move(tensors), [&](OperationCallbacks callbacks) {
      return group_.group->plan(builder, timeout(), std::move(callbacks));
    })->wait();
  }

  WorkPointer dispatch(
      DispatchArguments arguments, CallTensors tensors) override {
    return post(
        "automoe:dispatch",
        std::move(tensors),
        [&](OperationCallbacks callbacks) {
          return group_.group->dispatch(
              std::move(arguments), timeout(), std::move(callbacks));
        });
  }

  WorkPointer combine(
      CombineArguments arguments, CallTensors tensors) override {
    return post(
        "automoe:combine",
        std::move(tensors),
        [&](OperationCallbacks callbacks) {
          return group_.group->combine(
              std::move(arguments), timeout(), std::move(callbacks));
        });
  }

  void refuse(OperationKind /*kind*/, const std::string& fault) override {
    group_.group->refuse(fault);
  }

 private:
  std::chrono::milliseconds timeout() const { return group_.options->timeout; }

  template <typename Post>
  WorkPointer post(const char* title, CallTensors call, const Post& post) {
    const std::optional<std::vector<at::Tensor>> recorded = call.inputs;
    auto* tensors =
        new OperationTensors(std::move(call.inputs), std::move(call.outputs));
    try {
      tensors->setOperation(post(tensors->callbacks()));
    } catch (...) {
      // Nothing was posted, so the engine's share is ours to give back.
      tensors->releaseByCaller();
      tensors->releaseByCaller();
      throw;
    }
    return c10::make_intrusive<WorkAutoMoe>(
        topology().rank(),
        c10d::OpType::ALLTOALL_BASE,
        title,
        recorded,
        group_.engine,
        tensors);
  }

  RegisteredGroup group_;
};

c10::intrusive_ptr<c10d::ProcessGroup> resolve(const std::string& groupName) {
  try {
    return c10d::resolve_process_group(groupName);
  } catch (const c10::Error&) {
    TORCH_CHECK_VALUE(
        false,
        "group_name is '",
        groupName,
        "', expected the name of a process group of this process");
  }
}

}  // namespace

RouteFacts RowExchange::takeRoute(const at::Tensor& words) {
  const Route route(int32sOf(words));
  checkRoute(route);
  return factsOf(route);
}

std::unique_ptr<RowExchange> findRowExchange(const std::string& groupName) {
  std::optional<RegisteredGroup> group = findGroup(groupName);
  if (group.has_value()) {
    return std::make_unique<CoreExchange>(*std::move(group));
  }
  return std::make_unique<AllToAllExchange>(resolve(groupName));
}

}  // namespace automoe
