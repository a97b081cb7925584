// SPDX-License-Identifier: Apache-2.0
// NCCL on CUDA's library of the tests: ranks of one machine, by memory that
// they share. Collectives are sends to all, and sums in the order of ranks. The
// types are not NCCL's, so that its header is not needed.
#include <net/if.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "nccl_library/calls.hpp"

namespace automoe::nccl_library {
namespace {

enum Result {
  kSuccess = 0,
  kSystemError = 2,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kInProgress = 7
};
enum Operation { kSum, kProduct, kMost, kLeast };
constexpr std::array<size_t, 12> kTypeBytes = {
    1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};

struct Id {
  std::array<char, 128> bytes;
};

struct Config {
  size_t size;
  unsigned magic;
  unsigned version;
  int blocking;
};

template <class T>
void sum(
    void* to, const std::byte* from, size_t count, int ranks, int operation) {
  for (size_t i = 0; i < count; ++i) {
    T total{};
    for (int rank = 0; rank < ranks; ++rank) {
      T value;
      const size_t at = (static_cast<size_t>(rank) * count + i) * sizeof(T);
      std::memcpy(&value, from + at, sizeof(T));
      if (rank == 0) {
        total = value;
      } else if (operation == kSum) {
        total = static_cast<T>(total + value);
      } else if (operation == kProduct) {
        total = static_cast<T>(total * value);
      } else {
        total = operation == kMost ? std::max(total, value)
                                   : std::min(total, value);
      }
    }
    std::memcpy(static_cast<std::byte*>(to) + i * sizeof(T), &total, sizeof(T));
  }
}

using Sum = void (*)(void*, const std::byte*, size_t, int, int);

Sum sumOf(int type, int operation) {
  constexpr std::array<Sum, 9> kSums = {
      sum<int8_t>,
      sum<uint8_t>,
      sum<int32_t>,
      sum<uint32_t>,
      sum<int64_t>,
      sum<uint64_t>,
      nullptr,
      sum<float>,
      sum<double>};
  return operation > kLeast || type >= static_cast<int>(kSums.size())
             ? nullptr
             : kSums[static_cast<size_t>(type)];
}

std::byte* at(const void* data, size_t offset) {
  return static_cast<std::byte*>(const_cast<void*>(data)) + offset;
}

const Shared& from(void* handle) {
  return *static_cast<Shared*>(handle);
}

/// Each rank sends `stride` apart `bytes` to each, and sums what all send to
/// it.
int reduce(
    const void* data,
    size_t stride,
    void* to,
    size_t count,
    int type,
    int operation,
    void* handle,
    cudaStream_t stream) {
  const Shared& on = from(handle);
  const Sum sum = sumOf(type, operation);
  if (sum == nullptr) {
    return kInvalidArgument;
  }
  const size_t bytes = count * kTypeBytes[static_cast<size_t>(type)];
  const auto all = std::make_shared<std::vector<std::byte>>(
      bytes * static_cast<size_t>(on->size));
  Call call{on, stream, {}};
  for (int peer = 0; peer < on->size; ++peer) {
    const auto place = static_cast<size_t>(peer);
    call.moves.push_back({true, at(data, place * stride), bytes, peer});
    call.moves.push_back({false, all->data() + place * bytes, bytes, peer});
  }
  call.finish = [=] {
    if (to != nullptr) {
      sum(to, all->data(), count, on->size, operation);
    }
  };
  post(std::move(call));
  return kSuccess;
}

/// From each rank to each; of what is sent, and of what comes, `stride` apart.
int exchange(
    const void* data,
    size_t sendStride,
    void* to,
    size_t bytes,
    void* handle,
    cudaStream_t stream) {
  const Shared& on = from(handle);
  // What is sent may be where something comes.
  const auto kept = std::make_shared<std::vector<std::byte>>(
      bytes * static_cast<size_t>(on->size));
  Call call{on, stream, {}};
  for (int peer = 0; peer < on->size; ++peer) {
    const auto place = static_cast<size_t>(peer);
    call.moves.push_back({true, at(data, place * sendStride), bytes, peer});
    call.moves.push_back({false, kept->data() + place * bytes, bytes, peer});
  }
  call.finish = [=] { std::memcpy(to, kept->data(), kept->size()); };
  post(std::move(call));
  return kSuccess;
}

/// "=NAME" has NCCL use that interface alone.
bool hasInterface() {
  const char* name = std::getenv("NCCL_SOCKET_IFNAME");
  return name == nullptr || *name != '=' || if_nametoindex(name + 1) != 0;
}

size_t bytesOf(size_t count, int type) {
  return count * kTypeBytes[static_cast<size_t>(type)];
}

}  // namespace
}  // namespace automoe::nccl_library

using namespace automoe::nccl_library;

extern "C" {

int ncclGetVersion(int* version) {
  *version = 23007;
  return kSuccess;
}

const char* ncclGetErrorString(int result) {
  return result == kSuccess ? "no error" : "refused by NCCL of the tests";
}

const char* ncclGetLastError(void*) {
  return "";
}

int ncclGetUniqueId(Id* id) {
  std::random_device random;
  *id = {};
  std::snprintf(
      id->bytes.data(),
      id->bytes.size(),
      "nccl_of_tests-%08x%08x",
      random(),
      random());
  return kSuccess;
}

int ncclCommInitRankConfig(
    void** communicator, int size, Id id, int rank, const Config* config) {
  if (!hasInterface()) {
    return kInvalidUsage;
  }
  try {
    auto made = std::make_unique<Shared>(
        std::make_shared<Communicator>(id.bytes.data(), size, rank));
    const bool blocking = config == nullptr || config->blocking != 0;
    while (blocking && !(*made)->channels.complete()) {
      usleep(1000);
    }
    *communicator = made.release();
    return blocking ? kSuccess : kInProgress;
  } catch (const std::exception&) {
    return kSystemError;
  }
}

int ncclCommInitRank(void** communicator, int size, Id id, int rank) {
  return ncclCommInitRankConfig(communicator, size, id, rank, nullptr);
}

int ncclCommGetAsyncError(void* communicator, int* state) {
  *state = from(communicator)->channels.complete() ? kSuccess : kInProgress;
  return kSuccess;
}

int ncclCommFinalize(void*) {
  return kSuccess;
}

int ncclCommDestroy(void* communicator) {
  delete static_cast<Shared*>(communicator);
  return kSuccess;
}

int ncclCommAbort(void* communicator) {
  from(communicator)->aborted = true;
  return ncclCommDestroy(communicator);
}

int ncclCommCount(void* communicator, int* count) {
  *count = from(communicator)->size;
  return kSuccess;
}

int ncclCommUserRank(void* communicator, int* rank) {
  *rank = from(communicator)->rank;
  return kSuccess;
}

int ncclGroupStart() {
  beginGroup();
  return kSuccess;
}

int ncclGroupEnd() {
  endGroup();
  return kSuccess;
}

int ncclSend(
    const void* data,
    size_t count,
    int type,
    int peer,
    void* communicator,
    cudaStream_t stream) {
  Call call{from(communicator), stream, {}};
  call.moves.push_back({true, at(data, 0), bytesOf(count, type), peer});
  post(std::move(call));
  return kSuccess;
}

int ncclRecv(
    void* data,
    size_t count,
    int type,
    int peer,
    void* communicator,
    cudaStream_t stream) {
  Call call{from(communicator), stream, {}};
  call.moves.push_back({false, at(data, 0), bytesOf(count, type), peer});
  post(std::move(call));
  return kSuccess;
}

int ncclAllReduce(
    const void* data,
    void* to,
    size_t count,
    int type,
    int operation,
    void* communicator,
    cudaStream_t stream) {
  return reduce(data, 0, to, count, type, operation, communicator, stream);
}

int ncclReduce(
    const void* data,
    void* to,
    size_t count,
    int type,
    int operation,
    int root,
    void* communicator,
    cudaStream_t stream) {
  void* const own = from(communicator)->rank == root ? to : nullptr;
  return reduce(data, 0, own, count, type, operation, communicator, stream);
}

int ncclReduceScatter(
    const void* data,
    void* to,
    size_t count,
    int type,
    int operation,
    void* communicator,
    cudaStream_t stream) {
  const size_t stride = bytesOf(count, type);
  return reduce(data, stride, to, count, type, operation, communicator, stream);
}

int ncclAllGather(
    const void* data,
    void* to,
    size_t count,
    int type,
    void* communicator,
    cudaStream_t stream) {
  return exchange(data, 0, to, bytesOf(count, type), communicator, stream);
}

int ncclAlltoAll(
    const void* data,
    void* to,
    size_t count,
    int type,
    void* communicator,
    cudaStream_t stream) {
  const size_t bytes = bytesOf(count, type);
  return exchange(data, bytes, to, bytes, communicator, stream);
}

int ncclBroadcast(
    const void* data,
    void* to,
    size_t count,
    int type,
    int root,
    void* communicator,
    cudaStream_t stream) {
  const Shared& on = from(communicator);
  const size_t bytes = bytesOf(count, type);
  Call call{on, stream, {}};
  if (on->rank != root) {
    call.moves.push_back({false, at(to, 0), bytes, root});
    post(std::move(call));
    return kSuccess;
  }
  for (int peer = 0; peer < on->size; ++peer) {
    if (peer != root) {
      call.moves.push_back({true, at(data, 0), bytes, peer});
    }
  }
  call.finish = [=] { std::memmove(to, data, bytes); };
  post(std::move(call));
  return kSuccess;
}

int ncclBcast(
    void* data,
    size_t count,
    int type,
    int root,
    void* communicator,
    cudaStream_t stream) {
  return ncclBroadcast(data, data, count, type, root, communicator, stream);
}
}
