// SPDX-License-Identifier: Apache-2.0
// Which way CUDA tensors take between the ranks of a group, and why: a
// function of the facts of all ranks, so each of them chooses the same.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "process_group/device/device_facts.hpp"

namespace automoe {

enum class PairPath : uint8_t {
  kSameDevice,
  kNvlink,
  kPcie,
  kNoPeerAccess,
  kUnknown,  // neither rank's process nor NVML sees the other device
};

/// "same device", "NVLink", "PCIe P2P", "no P2P" or "not known".
const char* nameOf(PairPath path);

/// Of two ranks of one node that have a device each.
PairPath pairPath(const DeviceFacts& one, const DeviceFacts& other);

struct DeviceChoice {
  /// CUDA tensors can go between the GPUs themselves: every rank has one, those
  /// of each node share memory, and NCCL joins the nodes. Else the host stages
  /// them.
  bool usable = false;
  /// What is against that, or nothing.
  std::string obstacle;
  /// By node: its ranks read each other's memory by CUDA IPC.
  std::vector<bool> nodeMemory;
  /// All ranks can use NCCL together.
  bool nccl = false;
  /// What was found, what lacks, what is used and why.
  std::vector<std::string> lines;
};

/// `nodeOf[i]`, from 0 on, is the node of `ranks[i]`. Never throws for facts
/// that a peer may send.
DeviceChoice choosePath(
    std::span<const DeviceFacts> ranks, std::span<const int> nodeOf);

/// choosePath of encoded facts, as text. Throws TransportError for bytes that
/// are none, InvalidArgument where the lists differ in length.
std::vector<std::string> explainDevices(
    std::span<const std::string> facts, std::span<const int> nodeOf);

/// As text, what one rank knows without the others. Throws TransportError.
std::vector<std::string> explainDevice(const std::string& facts);

}  // namespace automoe
