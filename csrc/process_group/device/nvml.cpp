// SPDX-License-Identifier: Apache-2.0
#include "process_group/device/nvml.hpp"

#include <algorithm>
#include <array>

#include "process_group/common/error.hpp"
#include "process_group/device/shared_library.hpp"

namespace automoe {
namespace {

using NvmlDevice = struct NvmlDeviceTag*;

constexpr int kSuccess = 0;
// More than any GPU has; one that is not there is an error that is passed over.
constexpr unsigned kMostNvlinks = 36;
constexpr int kCapsRead = 0;
constexpr int kCapsWrite = 1;
constexpr int kCapsNvlink = 2;
constexpr int kP2pOk = 0;

/// nvmlGpuFabricInfo_v2_t
struct FabricInfo {
  unsigned version = sizeof(FabricInfo) | (2U << 24);
  DeviceUuid cluster = {};
  int status = 0;
  unsigned clique = 0;
  unsigned char state = 0;
  unsigned healthMask = 0;

  static constexpr unsigned char kNotSupported = 0;
  static constexpr unsigned char kCompleted = 3;
};
static_assert(sizeof(FabricInfo) == 36);

struct NvmlFunctions {
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  const char* (*errorString)(int result) = nullptr;
  int (*deviceGetCount)(unsigned* count) = nullptr;
  int (*deviceGetHandleByIndex)(unsigned index, NvmlDevice* device) = nullptr;
  int (*deviceGetUuid)(NvmlDevice device, char* text, unsigned size) = nullptr;
  int (*deviceGetNvLinkState)(NvmlDevice device, unsigned link, int* active) =
      nullptr;
  int (*deviceGetP2PStatus)(
      NvmlDevice from, NvmlDevice to, int what, int* status) = nullptr;
  int (*deviceGetGpuFabricInfo)(NvmlDevice device, FabricInfo* info) = nullptr;
};

struct NvmlEntry {
  NvmlDevice device = nullptr;
  DeviceUuid uuid = {};
};

NvmlFunctions load(SharedLibrary& library) {
  NvmlFunctions nvml;
  library.find("nvmlInit_v2", nvml.init);
  library.find("nvmlShutdown", nvml.shutdown);
  library.find("nvmlErrorString", nvml.errorString);
  library.find("nvmlDeviceGetCount_v2", nvml.deviceGetCount);
  library.find("nvmlDeviceGetHandleByIndex_v2", nvml.deviceGetHandleByIndex);
  library.find("nvmlDeviceGetUUID", nvml.deviceGetUuid);
  library.find("nvmlDeviceGetNvLinkState", nvml.deviceGetNvLinkState);
  library.find("nvmlDeviceGetP2PStatus", nvml.deviceGetP2PStatus);
  library.findOptional(
      "nvmlDeviceGetGpuFabricInfoV", nvml.deviceGetGpuFabricInfo);
  return nvml;
}

/// Those that can be asked: in a container perhaps not all of the node.
std::vector<NvmlEntry> listDevices(const NvmlFunctions& nvml) {
  std::vector<NvmlEntry> entries;
  unsigned count = 0;
  if (nvml.deviceGetCount(&count) != kSuccess) {
    return entries;
  }
  for (unsigned index = 0; index < count; ++index) {
    NvmlEntry entry;
    std::array<char, 96> text = {};
    if (nvml.deviceGetHandleByIndex(index, &entry.device) == kSuccess &&
        nvml.deviceGetUuid(
            entry.device,
            text.data(),
            static_cast<unsigned>(text.size()) - 1) == kSuccess) {
      if (const auto uuid = parseUuid(text.data())) {
        entry.uuid = *uuid;
        entries.push_back(entry);
      }
    }
  }
  return entries;
}

bool p2pIs(
    const NvmlFunctions& nvml, NvmlDevice from, NvmlDevice to, int what) {
  int status = kP2pOk;
  return nvml.deviceGetP2PStatus(from, to, what, &status) == kSuccess &&
         status == kP2pOk;
}

void addPeer(
    const NvmlFunctions& nvml,
    NvmlDevice own,
    const NvmlEntry& other,
    DeviceFacts& facts) {
  const auto known = std::find_if(
      facts.peers.begin(), facts.peers.end(), [&](const PeerFacts& peer) {
        return peer.uuid == other.uuid;
      });
  const bool nvlink = p2pIs(nvml, own, other.device, kCapsNvlink);
  if (known != facts.peers.end()) {
    // On access, CUDA's word counts.
    known->nvlink = known->access && nvlink;
    return;
  }
  const bool access = p2pIs(nvml, own, other.device, kCapsRead) &&
                      p2pIs(nvml, own, other.device, kCapsWrite);
  facts.peers.push_back({other.uuid, access, access && nvlink});
}

void addFabric(const NvmlFunctions& nvml, NvmlDevice own, DeviceFacts& facts) {
  if (nvml.deviceGetGpuFabricInfo == nullptr) {
    facts.notes.push_back(
        "NVML of this driver does not know fabrics (it does since 550)");
    return;
  }
  FabricInfo info;
  const int result = nvml.deviceGetGpuFabricInfo(own, &info);
  if (result != kSuccess || info.state == FabricInfo::kNotSupported) {
    return;  // Most devices are in none.
  }
  if (info.state != FabricInfo::kCompleted || info.status != kSuccess) {
    facts.notes.push_back(concat(
        "the device has not joined its NVLink fabric: state ",
        static_cast<int>(info.state),
        ", ",
        nvml.errorString(info.status),
        "; see the fabric manager's log"));
    return;
  }
  // In a machine that is its own fabric, the number is zero.
  facts.inFabric = info.cluster != DeviceUuid{};
  facts.fabric = info.cluster;
  facts.clique = info.clique;
}

}  // namespace

std::string uuidText(const DeviceUuid& uuid) {
  constexpr const char* kDigits = "0123456789abcdef";
  std::string text = "GPU-";
  for (size_t i = 0; i < uuid.size(); ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) {
      text += '-';
    }
    text += kDigits[uuid[i] >> 4];
    text += kDigits[uuid[i] & 15];
  }
  return text;
}

std::optional<DeviceUuid> parseUuid(const std::string& text) {
  if (text.rfind("GPU-", 0) != 0) {
    return std::nullopt;
  }
  DeviceUuid uuid = {};
  size_t digits = 0;
  for (const char letter : text.substr(4)) {
    if (letter == '-') {
      continue;
    }
    const bool decimal = letter >= '0' && letter <= '9';
    const bool hexadecimal = letter >= 'a' && letter <= 'f';
    if ((!decimal && !hexadecimal) || digits == 2 * uuid.size()) {
      return std::nullopt;
    }
    const int value = decimal ? letter - '0' : letter - 'a' + 10;
    uint8_t& byte = uuid[digits / 2];
    byte = static_cast<uint8_t>(byte * 16 + value);
    ++digits;
  }
  if (digits != 2 * uuid.size()) {
    return std::nullopt;
  }
  return uuid;
}

void addNvmlFacts(DeviceFacts& facts) {
  SharedLibrary library("libnvidia-ml.so.1");
  const NvmlFunctions nvml = load(library);
  if (!library.failure().empty()) {
    facts.notes.push_back(concat("NVML is not used: ", library.failure()));
    return;
  }
  if (const int result = nvml.init(); result != kSuccess) {
    facts.notes.push_back(
        concat("NVML is not used: ", nvml.errorString(result)));
    return;
  }
  const std::vector<NvmlEntry> entries = listDevices(nvml);
  const auto own =
      std::find_if(entries.begin(), entries.end(), [&](const NvmlEntry& entry) {
        return entry.uuid == facts.uuid;
      });
  if (own == entries.end()) {
    facts.notes.push_back(concat(
        "NVML does not know ",
        uuidText(facts.uuid),
        " (a MIG instance?): NVLink is not known"));
  } else {
    for (unsigned link = 0; link < kMostNvlinks; ++link) {
      int active = 0;
      if (nvml.deviceGetNvLinkState(own->device, link, &active) == kSuccess &&
          active != 0) {
        ++facts.nvlinks;
      }
    }
    for (const NvmlEntry& entry : entries) {
      if (entry.uuid != facts.uuid) {
        addPeer(nvml, own->device, entry, facts);
      }
    }
    addFabric(nvml, own->device, facts);
  }
  nvml.shutdown();
}

}  // namespace automoe
