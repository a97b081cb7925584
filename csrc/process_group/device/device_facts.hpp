// SPDX-License-Identifier: Apache-2.0
// What one rank knows of its GPU: found out here, sent to the other ranks.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace automoe {

using DeviceUuid = std::array<uint8_t, 16>;

/// From the device of a rank to another one of its node.
struct PeerFacts {
  DeviceUuid uuid = {};
  bool access = false;  // it can read and write the other one's memory
  bool nvlink = false;  // and the way is NVLink

  bool operator==(const PeerFacts&) const = default;
};

struct DeviceFacts {
  int rank = 0;             // in the group
  int ordinal = -1;         // in the process; -1: the rank has no device
  std::string whyNoDevice;  // where it has none

  std::string name;
  DeviceUuid uuid = {};
  std::string pciBusId;
  int computeMajor = 0;
  int computeMinor = 0;
  bool flagsSupported = false;  // streams of two processes can meet
  int nvlinks = 0;              // that are up
  bool inFabric = false;        // NVLink reaches other hosts
  DeviceUuid fabric = {};       // which one
  uint32_t clique = 0;          // and which part of it
  std::vector<PeerFacts> peers;

  int ncclVersion = 0;          // 23007 is 2.30.7; 0: there is none
  std::string whyNoNccl;        // where there is none
  bool ncclSharesGpus = false;  // NCCL_MULTI_RANK_GPU_ENABLE is 1

  std::vector<std::string> notes;  // what could not be found out, and why

  bool hasDevice() const { return ordinal >= 0; }
  bool operator==(const DeviceFacts&) const = default;
};

/// Of bounded size: longer texts and lists are cut.
std::string encodeFacts(const DeviceFacts& facts);
/// Throws TransportError for bytes that encodeFacts cannot have made.
DeviceFacts decodeFacts(std::string_view bytes);

struct FactsQuery {
  int rank = 0;
  int ordinal = -1;              // -1: the current device of this thread
  bool ncclSharesGpus = false;   // as NCCL_MULTI_RANK_GPU_ENABLE says
  std::string whyNoDevice = {};  // given: none is looked for
};

/// Facts of this process. Never throws: what lacks is told in the result. The
/// device stays as it is, no context is made on it.
DeviceFacts collectFacts(const FactsQuery& query) noexcept;

}  // namespace automoe
