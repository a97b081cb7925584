// SPDX-License-Identifier: Apache-2.0
// NCCL as the network between devices: the library that torch has loaded, by
// declarations of our own, so that none of its headers is needed.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstddef>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "process_group/device/device.hpp"

namespace automoe {

/// The functions that are used. Results are ncclResult_t, streams cudaStream_t.
struct NcclFunctions {
  using Communicator = struct NcclCommunicatorTag*;
  struct Id {
    std::array<char, 128> bytes = {};
  };
  /// ncclConfig_t as of 2.17, told to be that of 2.14, which ends after
  /// `blocking`. No version reads more of it than `size` and `version` say.
  struct Config {
    size_t size = 24;
    unsigned magic = 0xcafebeef;
    unsigned version = 21400;
    int blocking = 0;
    int cgaClusterSize = INT_MIN;  // undefined
    int minCtas = INT_MIN;
    int maxCtas = INT_MIN;
    const char* netName = nullptr;
  };

  static constexpr int kSuccess = 0;
  static constexpr int kInProgress = 7;
  static constexpr int kInt8 = 0;

  int (*getVersion)(int* version) = nullptr;
  int (*getUniqueId)(Id* id) = nullptr;
  int (*commInitRankConfig)(
      Communicator* communicator, int size, Id id, int rank, Config* config) =
      nullptr;
  int (*commGetAsyncError)(Communicator communicator, int* state) = nullptr;
  int (*commFinalize)(Communicator communicator) = nullptr;
  int (*commDestroy)(Communicator communicator) = nullptr;
  int (*commAbort)(Communicator communicator) = nullptr;
  int (*groupStart)() = nullptr;
  int (*groupEnd)() = nullptr;
  int (*send)(
      const void* data,
      size_t count,
      int type,
      int peer,
      Communicator communicator,
      Device::Stream stream) = nullptr;
  int (*receive)(
      void* data,
      size_t count,
      int type,
      int peer,
      Communicator communicator,
      Device::Stream stream) = nullptr;
  const char* (*getErrorString)(int result) = nullptr;
  const char* (*getLastError)(Communicator communicator) = nullptr;
};

struct NcclLibrary {
  NcclFunctions functions;
  int version = 0;     // 23007 is 2.30.7; 0: there is no library
  std::string reason;  // why there is none
};

/// Never throws. `file` is for tests.
NcclLibrary openNccl(const std::string& file = "libnccl.so.2");

/// "2.30.7" for 23007.
std::string ncclVersionText(int version);

/// By which the ranks of a group find each other; one rank makes it.
using NcclId = std::array<std::byte, 128>;
/// Throws DeviceError.
NcclId makeNcclId(const NcclFunctions& functions);

/// One communicator. It is a nonblocking one: so no call holds a lock while it
/// waits for a peer, and abort() can end it.
class NcclNetwork : public DeviceNetwork {
 public:
  struct Place {
    int rank = 0;
    int size = 1;
  };
  struct Terms {
    /// Of the constructor, of each exchange until it is enqueued, and of the
    /// end.
    std::chrono::milliseconds timeout;
    /// The most thread blocks of a kernel, 0: no limit. NCCL before 2.17 knows
    /// none.
    int maxCtas = 0;
    /// Asked while the constructor waits: whether some rank will never come.
    std::function<bool()> givenUp = [] { return false; };
  };

  /// Collective: returns when all ranks are there. The device of this rank is
  /// current. Throws DeviceError.
  NcclNetwork(
      const NcclFunctions& functions,
      const NcclId& id,
      Place place,
      const Terms& terms);
  /// The streams have passed all exchanges. Waits for the peers to come here
  /// too, unless a graph has exchanges.
  ~NcclNetwork() override;
  NcclNetwork(const NcclNetwork&) = delete;
  NcclNetwork& operator=(const NcclNetwork&) = delete;

  void exchange(
      Device::Stream stream,
      std::span<const Send> sends,
      std::span<const Receive> receives) override;
  void keepForGraphs() noexcept override { inGraphs_ = true; }
  void abort() noexcept override;
  std::string failure() override;

 private:
  void enqueue(
      Device::Stream stream,
      std::span<const Send> sends,
      std::span<const Receive> receives);
  using Asked = std::function<bool()>;
  void settle(const char* call, const Asked& givenUp = [] { return false; });
  void requireHealthy() const;
  [[noreturn]] void fail(const char* call, int result);
  bool finalized() noexcept;
  void end(NcclFunctions::Communicator communicator) noexcept;

  const NcclFunctions functions_;
  const Place place_;
  const std::chrono::milliseconds timeout_;
  std::mutex exchanging_;  // one exchange at a time; taken before mutex_
  std::mutex mutex_;       // of what follows
  NcclFunctions::Communicator communicator_ = nullptr;  // null: aborted
  std::string failure_;
  std::thread aborting_;
  std::atomic<bool> inGraphs_ = false;
};

}  // namespace automoe
