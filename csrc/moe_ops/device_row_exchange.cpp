// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/device_row_exchange.hpp"

#include <utility>

#include "moe_ops/tensors.hpp"
#include "process_group/device_groups.hpp"
#include "process_group/work_device.hpp"

namespace automoe {
namespace {

/// Plans are made on the host, so that is left to the group's other exchange.
class DeviceRowExchange final : public RowExchange {
 public:
  DeviceRowExchange(
      RegisteredGroup group,
      std::shared_ptr<DeviceGroup> devices,
      c10::Device device,
      std::unique_ptr<RowExchange> onHost)
      : group_(std::move(group)),
        devices_(std::move(devices)),
        device_(device),
        onHost_(std::move(onHost)) {}

  const Topology& topology() const override { return onHost_->topology(); }
  c10::Device device() const override { return device_; }
  void checkRoute(const Route& route) const override {
    onHost_->checkRoute(route);
  }
  void plan(const std::shared_ptr<RouteBuilder>& builder, CallTensors tensors)
      override {
    onHost_->plan(builder, std::move(tensors));
  }
  void refuse(OperationKind kind, const std::string& fault) override {
    onHost_->refuse(kind, fault);
  }

  WorkPointer dispatch(
      DispatchArguments arguments, CallTensors tensors) override {
    return post(
        std::move(tensors),
        [&](auto lists, const Route& route, DeviceExchange::Terms terms) {
          return devices_->exchange()->dispatch(
              std::move(lists), route, arguments, std::move(terms));
        });
  }
  WorkPointer combine(
      CombineArguments arguments, CallTensors tensors) override {
    return post(
        std::move(tensors),
        [&](auto lists, const Route& route, DeviceExchange::Terms terms) {
          return devices_->exchange()->combine(
              std::move(lists), route, arguments, std::move(terms));
        });
  }

 private:
  template <typename Post>
  WorkPointer post(CallTensors call, const Post& post) {
    // The words of the route are the first input.
    const at::Tensor words = call.inputs.front();
    std::vector<at::Tensor> kept = std::move(call.inputs);
    kept.insert(kept.end(), call.outputs.begin(), call.outputs.end());
    auto lists = devices_->listsOf(words);
    const CurrentStreamEvent after(device_);
    DeviceExchange::Terms terms;
    terms.after = after.get();
    terms.timeout = group_.options->timeout;
    terms.callbacks = keepingTensors(kept);
    DeviceExchange::Call posted =
        post(std::move(lists), Route(int32sOf(words)), std::move(terms));
    return c10::make_intrusive<WorkDevice>(
        topology().rank(),
        device_,
        devices_->device(),
        std::move(posted),
        std::move(call.outputs),
        std::move(kept));
  }

  const RegisteredGroup group_;
  const std::shared_ptr<DeviceGroup> devices_;
  const c10::Device device_;
  const std::unique_ptr<RowExchange> onHost_;
};

}  // namespace

std::unique_ptr<RowExchange> findDeviceExchange(
    const std::string& groupName, c10::Device device, const at::Tensor& route) {
  std::optional<RegisteredGroup> group = findGroup(groupName);
  if (!device.is_cuda() || !group.has_value()) {
    return nullptr;
  }
  auto onHost = findRowExchange(groupName);
  const bool sumsPerNode = checked(*onHost, OperationKind::kDispatch, [&] {
    const at::Tensor words = int32List("dispatch", "route", route);
    return Route(int32sOf(words)).sumsPerNode();
  });
  auto devices = deviceGroupOf(*group, device.index());
  if (devices->exchange() == nullptr || !sumsPerNode) {
    return nullptr;
  }
  checked(*onHost, OperationKind::kDispatch, [&] {
    TORCH_CHECK_VALUE(
        devices->ordinal() == device.index(),
        "tensors are on ",
        device,
        ", expected cuda:",
        devices->ordinal(),
        ", which this rank has used in the group before; use one device per "
        "rank and group");
  });
  return std::make_unique<DeviceRowExchange>(
      *std::move(group), std::move(devices), device, std::move(onHost));
}

}  // namespace automoe
