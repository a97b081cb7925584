// SPDX-License-Identifier: Apache-2.0
#include "process_group/device/cuda_device.hpp"

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

class CudaDevice : public Device {
 public:
  explicit CudaDevice(int ordinal) : context_(ordinal), memory_(ordinal) {
    const CurrentContext current(context_);
    cudaDeviceProp properties;
    checkCuda(
        cudaGetDeviceProperties(&properties, ordinal),
        "cudaGetDeviceProperties");
    name_ = concat(properties.name, " (", ordinal, ")");
  }

  std::string name() const override { return name_; }

  std::byte* allocate(size_t bytes) override {
    const CurrentContext current(context_);
    return allocateOrMakeRoom([&] { return memory_.allocate(bytes); });
  }
  std::byte* allocateShared(size_t bytes) override {
    const CurrentContext current(context_);
    return allocateOrMakeRoom([&] { return memory_.allocateShared(bytes); });
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
  std::byte* mapHost(std::byte* pages, size_t bytes) override {
    const CurrentContext current(context_);
    checkCuda(
        cudaHostRegister(
            pages, bytes, cudaHostRegisterMapped | cudaHostRegisterPortable),
        "cudaHostRegister");
    void* address = nullptr;
    const cudaError_t result = cudaHostGetDevicePointer(&address, pages, 0);
    if (result != cudaSuccess) {
      warnCuda(cudaHostUnregister(pages), "cudaHostUnregister");
    }
    checkCuda(result, "cudaHostGetDevicePointer");
    return static_cast<std::byte*>(address);
  }
  void unmapHost(std::byte* pages) noexcept override {
    quietly([&] { warnCuda(cudaHostUnregister(pages), "cudaHostUnregister"); });
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

  void setFlags(Stream stream, std::span<uint32_t* const> flags, uint32_t value)
      override {
    const CurrentContext current(context_);
    flags_.set(cudaStream(stream), flags, value);
  }
  void awaitFlags(
      Stream stream,
      std::span<uint32_t* const> flags,
      uint32_t value,
      uint32_t next) override {
    const CurrentContext current(context_);
    flags_.await(cudaStream(stream), flags, value, next);
  }

 private:
  template <typename Action>
  void quietly(const Action& action) noexcept {
    try {
      const CurrentContext current(context_);
      action();
    } catch (const std::exception& error) {
      log(LogLevel::kWarn, concat(name_, ": ", error.what()));
    }
  }

  const CudaContext context_;
  std::string name_;
  const CudaFlags flags_;
  CudaMemory memory_;
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

bool isCapturingCuda(Device::Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(cudaStream(stream), &status) != cudaSuccess) {
    cudaGetLastError();
    return true;
  }
  return status != cudaStreamCaptureStatusNone;
}

bool hasHappenedCuda(Device::Event event) {
  // Else a capture by this thread would take the question for unsafe.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  const bool happened = cudaEventQuery(cudaEvent(event)) == cudaSuccess;
  cudaGetLastError();
  cudaThreadExchangeStreamCaptureMode(&mode);
  return happened;
}

std::unique_ptr<DeviceNetwork> makeCudaNetwork(
    int ordinal,
    const NcclFunctions& functions,
    const NcclId& id,
    NcclNetwork::Place place,
    const NcclNetwork::Terms& terms) {
  const CudaContext context(ordinal);
  const CurrentContext current(context);
  return std::make_unique<NcclNetwork>(functions, id, place, terms);
}

}  // namespace automoe
