// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/device_launch.hpp"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <memory>
#include <mutex>

#include "process_group/device/cuda_device.hpp"
#include "process_group/exchange/device_exchange.hpp"
#include "process_group/work_device.hpp"

namespace automoe {
namespace {

/// A stream of our own, for a torch that does not tell which stream of CUDA
/// its current one is: events order the two.
class SideStream {
 public:
  explicit SideStream(int ordinal) {
    CudaDeviceResult result = makeCudaDevice(ordinal);
    if (result.device == nullptr) {
      throw DeviceError(result.reason);
    }
    device_ = std::move(result.device);
    stream_ = device_->makeStream();
  }

  void run(
      c10::Device device,
      const std::function<void(kernels::DeviceStream)>& launch) {
    const std::lock_guard lock(mutex_);
    const CurrentStreamEvent before(device);
    device_->await(stream_, before.get());
    launch(stream_);
    const DeviceEvent after(device_);
    device_->record(after.get(), stream_);
    awaitOnCurrentStream(device, after.get());
  }

  static SideStream& of(int ordinal) {
    // Leaked: the device may be gone when the process exits.
    static auto* mutex = new std::mutex();
    static auto* all = new std::map<int, std::unique_ptr<SideStream>>();
    const std::lock_guard lock(*mutex);
    std::unique_ptr<SideStream>& stream = (*all)[ordinal];
    if (stream == nullptr) {
      stream = std::make_unique<SideStream>(ordinal);
    }
    return *stream;
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<Device> device_;
  Device::Stream stream_ = nullptr;
};

template <typename TorchStream>
void launchBeside(
    const TorchStream& stream,
    const std::function<void(kernels::DeviceStream)>& launch) {
  if constexpr (requires { stream.native_handle(); }) {
    launch(stream.native_handle());
  } else {
    SideStream::of(stream.device_index()).run(stream.device(), launch);
  }
}

}  // namespace

void launchOn(
    c10::Device device,
    const std::function<void(kernels::DeviceStream)>& launch) {
  const c10::DeviceGuard current(device);
  const c10::impl::VirtualGuardImpl guard(device.type());
  launchBeside(guard.getStream(device), launch);
}

}  // namespace automoe
