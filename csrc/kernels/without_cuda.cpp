// SPDX-License-Identifier: Apache-2.0
// In the place of the kernels for devices (*.cu), in a build without CUDA.
#include <stdexcept>
#include <string>

#include "kernels/device_kernels.hpp"
#include "kernels/plan_kernels.hpp"

namespace automoe::kernels {
namespace {

[[noreturn]] void refuse(const char* kernel) {
  throw std::runtime_error(
      std::string(kernel) +
      " needs a GPU, but this torch_automoe is built without CUDA: build it "
      "where torch is a CUDA build and nvcc is found");
}

}  // namespace

void loadKernels() {
  refuse("loadKernels");
}

void enqueue(const GatherRows&, DeviceStream) {
  refuse("GatherRows");
}

void enqueue(const ReduceRows&, DeviceStream) {
  refuse("ReduceRows");
}

void enqueue(const CountIds&, DeviceStream) {
  refuse("CountIds");
}

void enqueue(const SortSlots&, DeviceStream) {
  refuse("SortSlots");
}

size_t scratchBytes(const SortSlots&) {
  refuse("SortSlots");
}

void enqueue(const ScaleAndDot&, DeviceStream) {
  refuse("ScaleAndDot");
}

void enqueue(const SameRows&, DeviceStream) {
  refuse("SameRows");
}

void enqueue(const ProbeRows&, DeviceStream) {
  refuse("ProbeRows");
}

void enqueue(const QuantizeRows&, DeviceStream) {
  refuse("QuantizeRows");
}

void enqueue(const DequantizeRows&, DeviceStream) {
  refuse("DequantizeRows");
}

void enqueue(const CountPlan&, DeviceStream) {
  refuse("CountPlan");
}

size_t scratchBytes(const CountPlan&) {
  refuse("CountPlan");
}

void enqueue(const ListPlan&, DeviceStream) {
  refuse("ListPlan");
}

void enqueue(const ScanCounts&, DeviceStream) {
  refuse("ScanCounts");
}

size_t scratchBytes(const ScanCounts&) {
  refuse("ScanCounts");
}

}  // namespace automoe::kernels
