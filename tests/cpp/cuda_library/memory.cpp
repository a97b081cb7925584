// SPDX-License-Identifier: Apache-2.0
// Memory of a CUDA library without a GPU: of the host, but that of "devices"
// begins poisoned and other processes can map it.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "cuda_library/streams.hpp"

namespace automoe::cuda_library {
namespace {

constexpr int kPoison = 0xCB;
constexpr size_t kTotal = size_t{4} << 30;

struct Piece {
  cudaMemoryType kind = cudaMemoryTypeDevice;
  size_t bytes = 0;
  int file = -1;  // of device memory of this process
};

std::mutex mutex;

/// By their first addresses; to be used with the mutex.
std::map<uintptr_t, Piece>& pieces() {
  static auto* const all = new std::map<uintptr_t, Piece>;
  return *all;
}

void add(const void* memory, Piece piece) {
  const std::lock_guard lock(mutex);
  pieces()[reinterpret_cast<uintptr_t>(memory)] = piece;
}

Piece remove(const void* memory) {
  const std::lock_guard lock(mutex);
  const auto found = pieces().find(reinterpret_cast<uintptr_t>(memory));
  if (found == pieces().end()) {
    return {};
  }
  const Piece piece = found->second;
  pieces().erase(found);
  return piece;
}

/// The piece with this address; of no bytes where there is none.
std::pair<uintptr_t, Piece> find(const void* memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const std::lock_guard lock(mutex);
  auto next = pieces().upper_bound(address);
  if (next == pieces().begin()) {
    return {};
  }
  --next;
  return address < next->first + next->second.bytes
             ? std::pair{next->first, next->second}
             : std::pair<uintptr_t, Piece>{};
}

bool isPageable(const void* memory) {
  return find(memory).second.bytes == 0;
}

/// What another process maps.
struct Exported {
  int process;
  int file;
  size_t bytes;
};

void* map(int file, size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}

}  // namespace
}  // namespace automoe::cuda_library

using namespace automoe::cuda_library;

extern "C" {

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  const int file = memfd_create("device memory", MFD_CLOEXEC);
  *memory = nullptr;
  if (bytes <= kTotal && file >= 0 &&
      ftruncate(file, static_cast<off_t>(bytes)) == 0) {
    *memory = map(file, bytes);
  }
  if (*memory == nullptr) {
    close(file);
    return cudaErrorMemoryAllocation;
  }
  std::memset(*memory, kPoison, bytes);
  add(*memory, {cudaMemoryTypeDevice, bytes, file});
  return deviceError();
}

cudaError_t cudaFree(void* memory) {
  if (memory == nullptr) {
    return deviceError();
  }
  synchronizeAll();
  const Piece piece = remove(memory);
  if (piece.bytes == 0 || piece.file < 0) {
    return cudaErrorInvalidValue;
  }
  munmap(memory, piece.bytes);
  close(piece.file);
  return deviceError();
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = *total = kTotal;
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  add(*memory, {cudaMemoryTypeHost, bytes});
  return deviceError();
}

cudaError_t cudaFreeHost(void* memory) {
  if (memory == nullptr) {
    return deviceError();
  }
  synchronizeAll();
  if (remove(memory).kind != cudaMemoryTypeHost) {
    return cudaErrorInvalidValue;
  }
  std::free(memory);
  return deviceError();
}

cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
  if (!isPageable(memory)) {
    return cudaErrorHostMemoryAlreadyRegistered;
  }
  add(memory, {cudaMemoryTypeHost, bytes});
  return deviceError();
}

cudaError_t cudaHostUnregister(void* memory) {
  return remove(memory).bytes == 0 ? cudaErrorHostMemoryNotRegistered
                                   : deviceError();
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return isPageable(host) ? cudaErrorInvalidValue : deviceError();
}

cudaError_t cudaPointerGetAttributes(
    struct cudaPointerAttributes* attributes, const void* memory) {
  const Piece piece = find(memory).second;
  *attributes = {};
  attributes->type = piece.bytes == 0 ? cudaMemoryTypeUnregistered : piece.kind;
  attributes->hostPointer = attributes->devicePointer =
      const_cast<void*>(memory);
  return deviceError();
}

// ---- between processes ----

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* memory) {
  const auto [begin, piece] = find(memory);
  if (piece.file < 0 || begin != reinterpret_cast<uintptr_t>(memory)) {
    return cudaErrorInvalidValue;
  }
  const Exported exported{getpid(), piece.file, piece.bytes};
  *handle = {};
  std::memcpy(handle->reserved, &exported, sizeof(exported));
  return deviceError();
}

cudaError_t cudaIpcOpenMemHandle(
    void** memory, cudaIpcMemHandle_t handle, unsigned) {
  Exported exported;
  std::memcpy(&exported, handle.reserved, sizeof(exported));
  if (exported.process == getpid()) {
    return cudaErrorDeviceUninitialized;  // as CUDA refuses its own
  }
  const std::string path = "/proc/" + std::to_string(exported.process) +
                           "/fd/" + std::to_string(exported.file);
  FILE* file = std::fopen(path.c_str(), "r+");
  *memory = file == nullptr ? nullptr : map(fileno(file), exported.bytes);
  if (file != nullptr) {
    std::fclose(file);
  }
  if (*memory == nullptr) {
    return cudaErrorMapBufferObjectFailed;
  }
  add(*memory, {cudaMemoryTypeDevice, exported.bytes});
  return deviceError();
}

cudaError_t cudaIpcCloseMemHandle(void* memory) {
  const Piece piece = remove(memory);
  if (piece.bytes == 0) {
    return cudaErrorInvalidValue;
  }
  munmap(memory, piece.bytes);
  return deviceError();
}

// ---- copies ----

cudaError_t cudaMemcpyAsync(
    void* to,
    const void* from,
    size_t bytes,
    enum cudaMemcpyKind,
    cudaStream_t stream) {
  if (isPageable(from)) {
    // CUDA, too, has read it when it returns.
    const auto* begin = static_cast<const std::byte*>(from);
    streamOf(stream).enqueue(
        [to, staged = std::vector<std::byte>(begin, begin + bytes)] {
          std::memcpy(to, staged.data(), staged.size());
          return true;
        });
    return deviceError();
  }
  streamOf(stream).enqueue([=] {
    std::memmove(to, from, bytes);
    return true;
  });
  if (isPageable(to)) {
    streamOf(stream).synchronize();
  }
  return deviceError();
}

cudaError_t cudaMemcpy(
    void* to, const void* from, size_t bytes, enum cudaMemcpyKind kind) {
  cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return cudaStreamSynchronize(nullptr);
}

cudaError_t cudaMemsetAsync(
    void* to, int value, size_t bytes, cudaStream_t stream) {
  streamOf(stream).enqueue([=] {
    std::memset(to, value, bytes);
    return true;
  });
  return deviceError();
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes, nullptr);
}
}
