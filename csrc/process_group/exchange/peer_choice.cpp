// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/peer_choice.hpp"

#include <algorithm>
#include <cmath>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

std::string microseconds(double seconds) {
  return concat(std::llround(seconds * 1e6), " us");
}

std::string sizeText(uint64_t bytes) {
  constexpr uint64_t kMebi = 1 << 20;
  return bytes >= kMebi ? concat(bytes / kMebi, " MiB")
                        : concat(bytes / 1024, " KiB");
}

}  // namespace

bool PeerChoice::peers(uint64_t bytes) const {
  if (times_.empty() || bytes > kMostBytes) {
    return false;
  }
  const auto distance = [&](const PeerTimes& it) {
    return std::abs(
        std::log2(static_cast<double>(std::max<uint64_t>(bytes, 1))) -
        std::log2(static_cast<double>(it.bytes)));
  };
  const auto nearest = std::min_element(
      times_.begin(), times_.end(), [&](const auto& left, const auto& right) {
        return distance(left) < distance(right);
      });
  return nearest->peers < nearest->network;
}

std::string PeerChoice::text() const {
  if (times_.empty()) {
    return "nothing was measured, NCCL carries all";
  }
  std::string text;
  for (const PeerTimes& it : times_) {
    text += concat(
        text.empty() ? "" : "; ",
        sizeText(it.bytes),
        ": ",
        microseconds(it.peers),
        " through memory of the node, ",
        microseconds(it.network),
        " by NCCL");
  }
  return text;
}

const std::vector<uint64_t>& peerTrialBytes() {
  static const std::vector<uint64_t> bytes{
      4 << 10, 64 << 10, 1 << 20, 16 << 20};
  return bytes;
}

PeerChoice measurePeers(const PeerTrial& trial) {
  std::vector<double> own;
  for (const uint64_t bytes : peerTrialBytes()) {
    own.push_back(trial.peers(bytes));
    own.push_back(trial.network(bytes));
  }
  const std::vector<double> slowest = trial.slowest(own);
  std::vector<PeerTimes> times;
  for (size_t i = 0; i < peerTrialBytes().size(); ++i) {
    times.push_back(
        {peerTrialBytes()[i], slowest.at(2 * i), slowest.at(2 * i + 1)});
  }
  return PeerChoice(std::move(times));
}

}  // namespace automoe
