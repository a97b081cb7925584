// SPDX-License-Identifier: Apache-2.0
#include "process_group/route_tensors.hpp"

#include <c10/util/Exception.h>

#include <utility>

#include "process_group/device/cuda_device.hpp"

namespace automoe {

RouteTensors::Tensors RouteTensors::of(
    const Key& key, c10::Device device, const std::function<Tensors()>& make) {
  const std::lock_guard lock(mutex_);
  for (const Made& made : made_) {
    if (made.key == key && made.device == device) {
      useOnCurrentStream(made);
      return made.tensors;
    }
  }
  TORCH_CHECK_VALUE(
      !isCapturing(device),
      "the lists of a part of this plan are not on ",
      device,
      " yet, and cannot be copied there while a graph is captured; make the "
      "same calls with this plan once before");
  Made made{key, device, make(), std::nullopt, nullptr};
  if (device.is_cuda()) {
    made.stream = currentStreamOf(device);
    made.since = std::make_unique<CurrentStreamEvent>(device);
  }
  return made_.emplace_back(std::move(made)).tensors;
}

void RouteTensors::useOnCurrentStream(const Made& made) {
  if (!made.stream.has_value()) {
    return;
  }
  const c10::Stream current = currentStreamOf(made.device);
  if (current == *made.stream) {
    return;
  }
  if (!hasHappenedCuda(made.since->get())) {
    TORCH_CHECK_VALUE(
        !isCapturing(made.device),
        "the lists of a part of this plan are still on their way to ",
        made.device,
        "; synchronize before a graph is captured");
    awaitOnCurrentStream(made.device, made.since->get());
  }
  for (const at::Tensor& tensor : made.tensors) {
    if (tensor.device() == made.device) {
      tensor.record_stream(current);
    }
  }
}

}  // namespace automoe
