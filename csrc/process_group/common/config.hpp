// SPDX-License-Identifier: Apache-2.0
// Every setting of the core, and the only place that reads the environment.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace automoe {

enum class LogLevel : uint8_t { kDebug = 0, kInfo = 1, kWarn = 2 };

/// Whether node-mates read each other's tensors directly, where the kernel
/// allows it: as a measurement of both ways says, always, or never.
enum class CrossMemory : uint8_t { kMeasured, kAlways, kNever };

/// Settings of one process. Each environment variable is named beside its
/// member; the other members are for tests and benchmarks.
struct Config {
  /// AUTOMOE_NODE: pins the node of this rank. Equal strings are one node,
  /// different strings are different nodes. Empty: found by mapping memory.
  std::string node;

  /// AUTOMOE_INTERFACE: network interface to use between nodes. Empty: the
  /// one on the route to MASTER_ADDR.
  std::string interface;

  /// AUTOMOE_LOG: debug, info or warn (the default).
  LogLevel logLevel = LogLevel::kWarn;

  /// AUTOMOE_MERGE_ROWS: 1 (the default) or 0. Whether equal rows of one
  /// all_to_all cross the network to a node once.
  bool mergeRows = true;

  /// NCCL_MULTI_RANK_GPU_ENABLE=1: NCCL's own, lets ranks share a GPU.
  bool ncclSharesGpus = false;

  /// MASTER_ADDR as torchrun sets it; only used to choose the interface.
  std::string masterAddress;

  CrossMemory crossMemory = CrossMemory::kMeasured;

  /// Largest payload that rides with its record over the network, in bytes.
  /// A message of this size and its header fit one segment of UCX's TCP.
  size_t eagerBytes = 60 * 1024;

  /// Most bytes of payload that may be under way to a peer that has not
  /// posted the operation yet.
  size_t unmatchedBytes = 4 << 20;

  /// Virtual size of this process's node memory; pages exist once touched.
  size_t nodeMemoryBytes = size_t{16} << 30;

  static Config fromEnvironment();
};

}  // namespace automoe
