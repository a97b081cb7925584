// SPDX-License-Identifier: Apache-2.0
// Which way equal blocks go inside one node: found by trying both.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace automoe {

/// Seconds of one all-to-all on the slowest rank.
struct PeerTimes {
  uint64_t bytes;  // of a rank's input
  double peers;    // through memory of the node
  double network;  // by NCCL
};

/// The faster way for each size: that of the measured size which is nearest, in
/// ratio. NCCL where nothing was measured, and above kMostBytes: memory of the
/// node has to hold what is sent, twice.
class PeerChoice {
 public:
  static constexpr uint64_t kMostBytes = 64 << 20;

  PeerChoice() = default;
  /// By rising bytes.
  explicit PeerChoice(std::vector<PeerTimes> times)
      : times_(std::move(times)) {}

  bool peers(uint64_t bytes) const;
  /// "64 KiB: 21 us through memory of the node, 25 us by NCCL; ...", or why
  /// nothing was measured.
  std::string text() const;

 private:
  std::vector<PeerTimes> times_;
};

/// How to try both ways; all ranks call these in the same order.
struct PeerTrial {
  /// Seconds of one call on this rank.
  std::function<double(uint64_t bytes)> peers;
  std::function<double(uint64_t bytes)> network;
  /// The greatest of all ranks, for each entry. Collective.
  std::function<std::vector<double>(std::vector<double>)> slowest;
};

/// The sizes at which both ways are tried, of a rank's input.
const std::vector<uint64_t>& peerTrialBytes();

/// Collective; every rank comes to the same choice. Throws what a way throws.
PeerChoice measurePeers(const PeerTrial& trial);

}  // namespace automoe
