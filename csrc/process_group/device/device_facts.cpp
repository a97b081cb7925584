// SPDX-License-Identifier: Apache-2.0
#include "process_group/device/device_facts.hpp"

#include <algorithm>
#include <exception>

#include "process_group/common/bytes.hpp"
#include "process_group/device/cuda_facts.hpp"
#include "process_group/device/nccl.hpp"
#include "process_group/device/nvml.hpp"

namespace automoe {
namespace {

constexpr uint8_t kVersion = 1;
constexpr size_t kMostText = 400;
constexpr size_t kMostPeers = 128;
constexpr size_t kMostNotes = 16;

void putText(ByteWriter& out, const std::string& text) {
  out.putString(std::string_view(text).substr(0, kMostText));
}

void putBool(ByteWriter& out, bool value) {
  out.put<uint8_t>(value ? 1 : 0);
}

std::string getText(ByteReader& in) {
  std::string text = in.getString();
  if (text.size() > kMostText) {
    throw TransportError(concat(
        "a text among facts of a device has ",
        text.size(),
        " bytes, expected at most ",
        kMostText));
  }
  return text;
}

bool getBool(ByteReader& in) {
  const auto value = in.get<uint8_t>();
  if (value > 1) {
    throw TransportError(concat(
        "a yes or no among facts of a device is ",
        static_cast<int>(value),
        ", expected 0 or 1"));
  }
  return value == 1;
}

size_t getCount(ByteReader& in, size_t most) {
  const auto count = in.get<uint32_t>();
  if (count > most) {
    throw TransportError(concat(
        "a list among facts of a device has ",
        count,
        " entries, expected at most ",
        most));
  }
  return count;
}

}  // namespace

std::string encodeFacts(const DeviceFacts& facts) {
  ByteWriter out;
  out.put(kVersion);
  out.put<int32_t>(facts.rank);
  out.put<int32_t>(facts.ordinal);
  putText(out, facts.whyNoDevice);
  putText(out, facts.name);
  out.put(facts.uuid);
  putText(out, facts.pciBusId);
  out.put<int32_t>(facts.computeMajor);
  out.put<int32_t>(facts.computeMinor);
  putBool(out, facts.flagsSupported);
  out.put<int32_t>(facts.nvlinks);
  putBool(out, facts.inFabric);
  out.put(facts.fabric);
  out.put(facts.clique);
  const size_t peers = std::min(facts.peers.size(), kMostPeers);
  out.put(static_cast<uint32_t>(peers));
  for (size_t i = 0; i < peers; ++i) {
    out.put(facts.peers[i].uuid);
    putBool(out, facts.peers[i].access);
    putBool(out, facts.peers[i].nvlink);
  }
  out.put<int32_t>(facts.ncclVersion);
  putText(out, facts.whyNoNccl);
  putBool(out, facts.ncclSharesGpus);
  const size_t notes = std::min(facts.notes.size(), kMostNotes);
  out.put(static_cast<uint32_t>(notes));
  for (size_t i = 0; i < notes; ++i) {
    putText(out, facts.notes[i]);
  }
  return out.take();
}

DeviceFacts decodeFacts(std::string_view bytes) {
  ByteReader in(bytes);
  const auto version = in.get<uint8_t>();
  if (version != kVersion) {
    throw TransportError(concat(
        "facts of a device are of version ",
        static_cast<int>(version),
        ", expected ",
        static_cast<int>(kVersion),
        "; run the same torch_automoe on all ranks"));
  }
  DeviceFacts facts;
  facts.rank = in.get<int32_t>();
  facts.ordinal = in.get<int32_t>();
  facts.whyNoDevice = getText(in);
  facts.name = getText(in);
  facts.uuid = in.get<DeviceUuid>();
  facts.pciBusId = getText(in);
  facts.computeMajor = in.get<int32_t>();
  facts.computeMinor = in.get<int32_t>();
  facts.flagsSupported = getBool(in);
  facts.nvlinks = in.get<int32_t>();
  facts.inFabric = getBool(in);
  facts.fabric = in.get<DeviceUuid>();
  facts.clique = in.get<uint32_t>();
  facts.peers.resize(getCount(in, kMostPeers));
  for (PeerFacts& peer : facts.peers) {
    peer.uuid = in.get<DeviceUuid>();
    peer.access = getBool(in);
    peer.nvlink = getBool(in);
  }
  facts.ncclVersion = in.get<int32_t>();
  facts.whyNoNccl = getText(in);
  facts.ncclSharesGpus = getBool(in);
  facts.notes.resize(getCount(in, kMostNotes));
  for (std::string& note : facts.notes) {
    note = getText(in);
  }
  if (in.remaining() > 0) {
    throw TransportError(
        concat(in.remaining(), " bytes follow after the facts of a device"));
  }
  return facts;
}

DeviceFacts collectFacts(const FactsQuery& query) noexcept {
  DeviceFacts facts;
  try {
    facts.rank = query.rank;
    facts.ncclSharesGpus = query.ncclSharesGpus;
    facts.whyNoDevice = query.whyNoDevice;
    if (query.whyNoDevice.empty()) {
      addCudaFacts(query.ordinal, facts);
    }
    if (facts.hasDevice()) {
      const NcclLibrary nccl = openNccl();
      facts.ncclVersion = nccl.version;
      facts.whyNoNccl = nccl.reason;
      addNvmlFacts(facts);
    }
  } catch (const std::exception& error) {
    if (facts.hasDevice()) {
      facts.notes.push_back(error.what());
    } else {
      facts.whyNoDevice = error.what();
    }
  }
  return facts;
}

}  // namespace automoe
