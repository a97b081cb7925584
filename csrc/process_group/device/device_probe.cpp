// SPDX-License-Identifier: Apache-2.0
#include "process_group/device/device_probe.hpp"

#include <algorithm>
#include <map>
#include <set>

#include "process_group/common/error.hpp"
#include "process_group/device/device_text.hpp"
#include "process_group/device/nccl.hpp"

namespace automoe {
namespace {

// Since when it takes two ranks on one GPU, if its variable says so too.
constexpr int kNcclSharesGpus = 23000;
constexpr const char* kSharing = "NCCL_MULTI_RANK_GPU_ENABLE=1";

/// Whether the ranks of one node can use memory of CUDA IPC.
class NodeProbe {
 public:
  NodeProbe(int node, Ranks ranks) : node_(node), ranks_(std::move(ranks)) {
    for (size_t i = 0; i < ranks_.size(); ++i) {
      for (size_t j = i + 1; j < ranks_.size(); ++j) {
        pairs_[pairPath(*ranks_[i], *ranks_[j])].push_back(
            concat(ranks_[i]->rank, "-", ranks_[j]->rank));
      }
    }
  }

  /// Why they cannot, or nothing.
  std::string obstacle() const {
    for (const PairPath path : {PairPath::kNoPeerAccess, PairPath::kUnknown}) {
      if (const auto found = pairs_.find(path); found != pairs_.end()) {
        return concat(
            path == PairPath::kUnknown
                ? "peer access is not known between ranks "
                : "there is no peer access between ranks ",
            joinSome(found->second));
      }
    }
    Ranks without;
    std::copy_if(
        ranks_.begin(),
        ranks_.end(),
        std::back_inserter(without),
        [](const DeviceFacts* facts) { return !facts->flagsSupported; });
    if (ranks_.size() > 1 && !without.empty()) {
      return concat(
          "streams of ", rankText(without), " cannot wait for memory");
    }
    return "";
  }

  void explain(std::vector<std::string>& lines) const {
    const std::string name = concat("node ", node_, ": ");
    for (const auto& [path, pairs] : pairs_) {
      lines.push_back(concat(
          name,
          nameOf(path),
          " between ",
          plural(pairs.size(), "pair"),
          " of ranks: ",
          joinSome(pairs)));
    }
    const std::string why = obstacle();
    if (!why.empty()) {
      lines.push_back(
          concat(name, "GPU memory cannot be shared, because ", why));
    } else if (ranks_.size() > 1) {
      lines.push_back(concat(
          name,
          rankText(ranks_),
          " can read each other's GPU memory (CUDA IPC)"));
    }
  }

 private:
  int node_;
  Ranks ranks_;
  std::map<PairPath, std::vector<std::string>> pairs_;
};

/// Whether two ranks do, of one node or of containers on one machine.
bool shareDevice(const Ranks& ranks) {
  std::set<DeviceUuid> seen;
  return !std::all_of(
      ranks.begin(), ranks.end(), [&](const DeviceFacts* facts) {
        return seen.insert(facts->uuid).second;
      });
}

/// Why the ranks cannot use NCCL together, or nothing.
std::string ncclObstacle(const Ranks& ranks, bool shared) {
  const DeviceFacts& first = *ranks.front();
  for (const DeviceFacts* facts : ranks) {
    if (facts->ncclVersion == 0) {
      return concat("on rank ", facts->rank, ", ", facts->whyNoNccl);
    }
    if (facts->ncclVersion != first.ncclVersion) {
      return concat(
          "ranks ",
          first.rank,
          " and ",
          facts->rank,
          " have different versions: ",
          ncclVersionText(first.ncclVersion),
          " and ",
          ncclVersionText(facts->ncclVersion));
    }
  }
  if (shared && first.ncclVersion < kNcclSharesGpus) {
    return concat(
        "two ranks share a GPU, which needs NCCL >= ",
        ncclVersionText(kNcclSharesGpus),
        " with ",
        kSharing,
        ", not ",
        ncclVersionText(first.ncclVersion));
  }
  for (const DeviceFacts* facts : ranks) {
    if (shared && !facts->ncclSharesGpus) {
      return concat(
          "two ranks share a GPU, which needs ",
          kSharing,
          "; it is not set on rank ",
          facts->rank);
    }
  }
  return "";
}

/// Of fabrics that reach further than a node: nothing is made of them.
void explainFabrics(
    std::span<const DeviceFacts> ranks,
    std::span<const int> nodeOf,
    std::vector<std::string>& lines) {
  for (size_t i = 1; i < ranks.size(); ++i) {
    if (nodeOf[i] != nodeOf[0] && ranks[0].inFabric && ranks[i].inFabric &&
        ranks[i].fabric == ranks[0].fabric &&
        ranks[i].clique == ranks[0].clique) {
      lines.push_back(concat(
          "NVLink joins nodes ",
          nodeOf[0],
          " and ",
          nodeOf[i],
          " (fabric clique ",
          ranks[0].clique,
          "); between nodes, that is left to NCCL"));
      return;
    }
  }
}

/// Why not all ranks have a device, or nothing.
std::string explainAbsence(
    const Ranks& ranks, std::vector<std::string>& lines) {
  Ranks without;
  std::set<std::string> reasons;
  for (const DeviceFacts* facts : ranks) {
    if (!facts->hasDevice()) {
      without.push_back(facts);
      reasons.insert(facts->whyNoDevice);
    }
  }
  if (without.size() < ranks.size()) {
    explainRanks(ranks, lines);
    return without.empty() ? ""
                           : concat(
                                 rankText(without),
                                 without.size() == 1 ? " has" : " have",
                                 " no CUDA device");
  }
  if (reasons.size() == 1) {
    lines.push_back(concat(
        "no CUDA device: ",
        *reasons.begin(),
        "; the exchange runs on CPU ranks"));
  } else {
    explainRanks(ranks, lines);
    lines.push_back("the exchange runs on CPU ranks");
  }
  return "no rank has a CUDA device";
}

/// Sets what follows from the nodes and from NCCL; every rank has a device.
void chooseDirect(
    const Ranks& all, const std::map<int, Ranks>& nodes, DeviceChoice& choice) {
  size_t index = 0;
  for (const auto& [node, members] : nodes) {
    const NodeProbe probe(node, members);
    const std::string why = probe.obstacle();
    choice.nodeMemory[index++] = why.empty();
    if (choice.obstacle.empty() && !why.empty()) {
      choice.obstacle = concat("on node ", node, ", ", why);
    }
    probe.explain(choice.lines);
  }
  const std::string why = ncclObstacle(all, shareDevice(all));
  choice.nccl = why.empty();
  if (choice.nccl) {
    choice.lines.push_back(concat(
        "NCCL ",
        ncclVersionText(all.front()->ncclVersion),
        nodes.size() > 1 ? " can carry rows between nodes"
                         : " is there; inside one node, no row needs it"));
    return;
  }
  choice.lines.push_back(concat("NCCL cannot be used: ", why));
  if (choice.obstacle.empty() && nodes.size() > 1) {
    choice.obstacle = concat("NCCL cannot carry rows between nodes: ", why);
  }
}

}  // namespace

const char* nameOf(PairPath path) {
  switch (path) {
    case PairPath::kSameDevice:
      return "same device";
    case PairPath::kNvlink:
      return "NVLink";
    case PairPath::kPcie:
      return "PCIe P2P";
    case PairPath::kNoPeerAccess:
      return "no P2P";
    case PairPath::kUnknown:
      return "not known";
  }
  return "?";
}

PairPath pairPath(const DeviceFacts& one, const DeviceFacts& other) {
  if (one.uuid == other.uuid) {
    return PairPath::kSameDevice;
  }
  bool known = false;
  bool access = true;
  bool nvlink = true;
  const auto look = [&](const DeviceFacts& from, const DeviceFacts& to) {
    for (const PeerFacts& peer : from.peers) {
      if (peer.uuid == to.uuid) {
        known = true;
        access = access && peer.access;
        nvlink = nvlink && peer.nvlink;
      }
    }
  };
  look(one, other);
  look(other, one);
  if (!known) {
    return PairPath::kUnknown;
  }
  if (!access) {
    return PairPath::kNoPeerAccess;
  }
  return nvlink ? PairPath::kNvlink : PairPath::kPcie;
}

DeviceChoice choosePath(
    std::span<const DeviceFacts> ranks, std::span<const int> nodeOf) {
  DeviceChoice choice;
  Ranks all;
  std::map<int, Ranks> nodes;
  for (size_t i = 0; i < std::min(ranks.size(), nodeOf.size()); ++i) {
    all.push_back(&ranks[i]);
    nodes[nodeOf[i]].push_back(&ranks[i]);
  }
  choice.nodeMemory.resize(nodes.size(), false);
  choice.obstacle = explainAbsence(all, choice.lines);
  if (choice.obstacle.empty()) {
    chooseDirect(all, nodes, choice);
    explainFabrics(ranks, nodeOf, choice.lines);
  }
  choice.usable = choice.obstacle.empty();
  const bool someDevice =
      std::any_of(all.begin(), all.end(), [](const DeviceFacts* facts) {
        return facts->hasDevice();
      });
  if (choice.usable) {
    choice.lines.push_back("CUDA tensors can go between the GPUs themselves");
  } else if (someDevice) {
    choice.lines.push_back(concat(
        "CUDA tensors are to be staged through the host: ", choice.obstacle));
  }
  return choice;
}

std::vector<std::string> explainDevices(
    std::span<const std::string> facts, std::span<const int> nodeOf) {
  if (facts.size() != nodeOf.size()) {
    throw InvalidArgument(concat(
        "explain_devices got facts of ",
        facts.size(),
        " ranks and nodes of ",
        nodeOf.size(),
        ", expected as many"));
  }
  std::vector<DeviceFacts> ranks;
  for (const std::string& bytes : facts) {
    ranks.push_back(decodeFacts(bytes));
  }
  return choosePath(ranks, nodeOf).lines;
}

std::vector<std::string> explainDevice(const std::string& facts) {
  const DeviceFacts known = decodeFacts(facts);
  const Ranks ranks = {&known};
  std::vector<std::string> lines;
  if (!explainAbsence(ranks, lines).empty()) {
    return lines;
  }
  std::map<PairPath, size_t> ways;
  for (const PeerFacts& peer : known.peers) {
    DeviceFacts other;
    other.uuid = peer.uuid;
    ++ways[pairPath(known, other)];
  }
  for (const auto& [path, count] : ways) {
    lines.push_back(concat(
        "rank ",
        known.rank,
        ": ",
        nameOf(path),
        " to ",
        plural(count, "other GPU"),
        " of its machine"));
  }
  const std::string why = ncclObstacle(ranks, false);
  lines.push_back(
      why.empty() ? concat("NCCL ", ncclVersionText(known.ncclVersion))
                  : concat("NCCL cannot be used: ", why));
  return lines;
}

}  // namespace automoe
