// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/device_row_exchange.hpp"

#include <utility>

#include "moe_ops/tensors.hpp"
#include "process_group/device_groups.hpp"
#include "process_group/work_device.hpp"

namespace automoe {
namespace {

/// For calls on one route. Plans are made on the host, so that is left to the
/// group's other exchange.
class DeviceRowExchange final : public RowExchange {
 public:
  DeviceRowExchange(
      RegisteredGroup group,
      std::shared_ptr<DeviceGroup> devices,
      c10::Device device,
      std::unique_ptr<RowExchange> onHost,
      std::shared_ptr<const KnownRoute> route)
      : group_(std::move(group)),
        devices_(std::move(devices)),
        device_(device),
        onHost_(std::move(onHost)),
        route_(std::move(route)) {}

  const Topology& topology() const override { return onHost_->topology(); }
  c10::Device device() const override { return device_; }
  void checkRoute(const Route& route) const override {
    onHost_->checkRoute(route);
  }
  RouteFacts takeRoute(const at::Tensor& words) override {
    lists_ = devices_->listsOf(*route_, words);
    return route_->facts;
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
        std::move(tensors), [&](auto lists, DeviceExchange::Terms terms) {
          return devices_->exchange()->dispatch(
              std::move(lists), arguments, std::move(terms));
        });
  }
  WorkPointer combine(
      CombineArguments arguments, CallTensors tensors) override {
    return post(
        std::move(tensors), [&](auto lists, DeviceExchange::Terms terms) {
          return devices_->exchange()->combine(
              std::move(lists), arguments, std::move(terms));
        });
  }

 private:
  template <typename Post>
  WorkPointer post(CallTensors call, const Post& post) {
    std::vector<at::Tensor> tensors = std::move(call.inputs);
    tensors.insert(tensors.end(), call.outputs.begin(), call.outputs.end());
    auto kept = std::make_shared<KeptTensors>(std::move(tensors));
    const CurrentStreamEvent after = inputsReady(*group_.group, device_);
    DeviceExchange::Terms terms;
    terms.after = after.get();
    terms.timeout = group_.options->timeout;
    terms.callbacks = keepingTensors(kept);
    terms.maxBlocks = group_.options->maxCtas.value_or(0);
    terms.wire = group_.options->fp8Wire ? DeviceWire::kFp8 : DeviceWire::kAsIs;
    DeviceExchange::Call posted = post(lists_, std::move(terms));
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
  const std::shared_ptr<const KnownRoute> route_;
  std::shared_ptr<const DeviceRoute> lists_;
};

}  // namespace

std::unique_ptr<RowExchange> findDeviceExchange(
    const std::string& groupName, c10::Device device, const at::Tensor& route) {
  std::optional<RegisteredGroup> group = findGroup(groupName);
  if (!device.is_cuda() || !group.has_value()) {
    return nullptr;
  }
  auto onHost = findRowExchange(groupName);
  auto known = checked(*onHost, OperationKind::kDispatch, [&] {
    return KnownRoutes::instance().find(int32List("dispatch", "route", route));
  });
  auto devices = deviceGroupOf(*group, device.index());
  if (devices->exchange() == nullptr || !known->facts.sumsPerNode) {
    return nullptr;
  }
  checked(*onHost, OperationKind::kDispatch, [&] {
    devices->checkOrdinal(device);
  });
  return std::make_unique<DeviceRowExchange>(
      *std::move(group),
      std::move(devices),
      device,
      std::move(onHost),
      std::move(known));
}

}  // namespace automoe
