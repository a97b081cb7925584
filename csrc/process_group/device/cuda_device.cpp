// SPDX-License-Identifier: Apache-2.0
#include "process_group/device/cuda_device.hpp"

#include <mutex>
#include <optional>

#include "process_group/device/cuda_calls.hpp"
#include "process_group/device/cuda_context.hpp"
#include "process_group/device/cuda_facts.hpp"
#include "process_group/device/cuda_flags.hpp"
#include "process_group/device/cuda_memory.hpp"

namespace automoe {
namespace {

cudaStream_t cudaStream(Device::Stream stream) {
  return reinterpret_cast<cudaStream_t>(stream);
}

cudaEvent_t cudaEvent(Device::Event event) {
  return reinterpret_cast<cudaEvent_t>(event);
}

cudaStream_t makeUrgentStream() {
  int least = 0;
  int greatest = 0;
  checkCuda(
      cudaDeviceGetStreamPriorityRange(&least, &greatest),
      "cudaDeviceGetStreamPriorityRange");
  cudaStream_t stream = nullptr;
  // Non-blocking: it does not wait for the default stream, nor that for it.
  checkCuda(
      cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
      "cudaStreamCreateWithPriority");
  return stream;
}

/// Writes words from the host on a stream of its own. Each has a place in
/// page-locked memory until it is written; places are used in turn.
class HostWrites {
 public:
  HostWrites() : stream_(makeUrgentStream()) {
    void* memory = nullptr;
    checkCuda(
        cudaHostAlloc(
            &memory, kPlaces * sizeof(uint32_t), cudaHostAllocPortable),
        "cudaHostAlloc");
    places_ = static_cast<uint32_t*>(memory);
  }
  ~HostWrites() {
    warnCuda(cudaStreamDestroy(stream_), "cudaStreamDestroy");
    warnCuda(cudaFreeHost(places_), "cudaFreeHost");
  }
  HostWrites(const HostWrites&) = delete;
  HostWrites& operator=(const HostWrites&) = delete;

  void write(uint32_t* to, uint32_t value) noexcept {
    const std::lock_guard lock(mutex_);
    if (next_ == kPlaces) {
      warnCuda(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
      next_ = 0;
    }
    uint32_t* place = places_ + next_++;
    *place = value;
    warnCuda(
        cudaMemcpyAsync(to, place, sizeof(value), cudaMemcpyDefault, stream_),
        "cudaMemcpyAsync");
  }

 private:
  static constexpr size_t kPlaces = 1024;

  std::mutex mutex_;
  cudaStream_t stream_ = nullptr;
  uint32_t* places_ = nullptr;
  size_t next_ = 0;
};

class CudaDevice : public Device {
 public:
  explicit CudaDevice(int ordinal)
      : context_(ordinal), flags_(ordinal), memory_(ordinal) {
    const CurrentContext current(context_);
    hostWrites_.emplace();
    cudaDeviceProp properties;
    checkCuda(
        cudaGetDeviceProperties(&properties, ordinal),
        "cudaGetDeviceProperties");
    name_ = concat(properties.name, " (", ordinal, ")");
  }

  ~CudaDevice() override {
    quietly([&] { hostWrites_.reset(); });
  }

  std::string name() const override { return name_; }

  std::byte* allocate(size_t bytes) override {
    const CurrentContext current(context_);
    return memory_.allocate(bytes);
  }
  void free(std::byte* memory) noexcept override {
    quietly([&] { memory_.free(memory); });
  }
  std::byte* allocateHost(size_t bytes) override {
    const CurrentContext current(context_);
    void* memory = nullptr;
    checkCuda(
        cudaHostAlloc(&memory, bytes, cudaHostAllocPortable), "cudaHostAlloc");
    return static_cast<std::byte*>(memory);
  }
  void freeHost(std::byte* memory) noexcept override {
    quietly([&] { warnCuda(cudaFreeHost(memory), "cudaFreeHost"); });
  }
  Handle exportMemory(std::byte* memory) override {
    const CurrentContext current(context_);
    return memory_.exportMemory(memory);
  }
  std::byte* openMemory(const Handle& handle) override {
    const CurrentContext current(context_);
    return memory_.openMemory(handle);
  }
  void closeMemory(std::byte* memory) noexcept override {
    quietly([&] { memory_.closeMemory(memory); });
  }

  Stream makeStream() override {
    const CurrentContext current(context_);
    return reinterpret_cast<Stream>(makeUrgentStream());
  }
  void destroyStream(Stream stream) noexcept override {
    quietly([&] {
      warnCuda(cudaStreamDestroy(cudaStream(stream)), "cudaStreamDestroy");
    });
  }
  Event makeEvent() override {
    const CurrentContext current(context_);
    cudaEvent_t event = nullptr;
    checkCuda(
        cudaEventCreateWithFlags(&event, cudaEventDisableTiming),
        "cudaEventCreateWithFlags");
    return reinterpret_cast<Event>(event);
  }
  void destroyEvent(Event event) noexcept override {
    quietly([&] {
      warnCuda(cudaEventDestroy(cudaEvent(event)), "cudaEventDestroy");
    });
  }
  void record(Event event, Stream stream) override {
    const CurrentContext current(context_);
    checkCuda(
        cudaEventRecord(cudaEvent(event), cudaStream(stream)),
        "cudaEventRecord");
  }
  void await(Stream stream, Event event) override {
    const CurrentContext current(context_);
    checkCuda(
        cudaStreamWaitEvent(cudaStream(stream), cudaEvent(event), 0),
        "cudaStreamWaitEvent");
  }
  bool happened(Event event) override {
    const CurrentContext current(context_);
    const cudaError_t result = cudaEventQuery(cudaEvent(event));
    if (result == cudaErrorNotReady) {
      cudaGetLastError();
      return false;
    }
    checkCuda(result, "cudaEventQuery");
    return true;
  }
  bool isCapturing(Stream stream) override {
    const CurrentContext current(context_);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    checkCuda(
        cudaStreamIsCapturing(cudaStream(stream), &status),
        "cudaStreamIsCapturing");
    return status != cudaStreamCaptureStatusNone;
  }
  void synchronize(Stream stream) override {
    const CurrentContext current(context_);
    checkCuda(
        cudaStreamSynchronize(cudaStream(stream)), "cudaStreamSynchronize");
  }

  void copy(Stream stream, std::byte* to, const std::byte* from, size_t bytes)
      override {
    if (bytes == 0) {
      return;
    }
    const CurrentContext current(context_);
    checkCuda(
        cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, cudaStream(stream)),
        "cudaMemcpyAsync");
  }
  void clear(Stream stream, std::byte* to, size_t bytes) override {
    if (bytes == 0) {
      return;
    }
    const CurrentContext current(context_);
    checkCuda(
        cudaMemsetAsync(to, 0, bytes, cudaStream(stream)), "cudaMemsetAsync");
  }
  void run(Stream stream, std::function<void(kernels::DeviceStream)> launch)
      override {
    const CurrentContext current(context_);
    cudaGetLastError();  // What is found below is then of this launch.
    try {
      launch(cudaStream(stream));
    } catch (const Error&) {
      throw;
    } catch (const std::exception& error) {
      throw DeviceError(error.what());  // kernels know no errors of ours
    }
    checkCuda(cudaGetLastError(), "the launch of a kernel");
  }

  void setFlag(Stream stream, uint32_t* flag, uint32_t value) override {
    const CurrentContext current(context_);
    flags_.set(cudaStream(stream), flag, value);
  }
  void awaitFlag(Stream stream, uint32_t* flag, uint32_t value) override {
    const CurrentContext current(context_);
    flags_.await(cudaStream(stream), flag, value);
  }
  void setFlagNow(uint32_t* flag, uint32_t value) noexcept override {
    quietly([&] { hostWrites_->write(flag, value); });
  }

 private:
  template <typename Action>
  void quietly(const Action& action) noexcept {
    try {
      const CurrentContext current(context_);
      action();
    } catch (const std::exception& error) {
      log(LogLevel::kWarn, error.what());
    }
  }

  const CudaContext context_;
  std::string name_;
  const CudaFlags flags_;
  CudaMemory memory_;
  std::optional<HostWrites> hostWrites_;
};

}  // namespace

CudaDeviceResult makeCudaDevice(int ordinal) {
  DeviceFacts facts;
  addCudaFacts(ordinal, facts);
  if (!facts.hasDevice()) {
    return {nullptr, facts.whyNoDevice};
  }
  return {std::make_unique<CudaDevice>(facts.ordinal), ""};
}

std::unique_ptr<DeviceNetwork> makeCudaNetwork(
    int ordinal,
    const NcclFunctions& functions,
    const NcclId& id,
    NcclNetwork::Place place,
    std::chrono::milliseconds timeout) {
  const CudaContext context(ordinal);
  const CurrentContext current(context);
  return std::make_unique<NcclNetwork>(functions, id, place, timeout);
}

}  // namespace automoe
