// SPDX-License-Identifier: Apache-2.0
// One plan that a device makes: it gathers the ids of all ranks, counts, and
// writes the lists of this rank.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/plan_kernels.hpp"
#include "process_group/exchange/device_moves.hpp"
#include "process_group/exchange/device_route.hpp"
#include "process_group/exchange/plan_list.hpp"

namespace automoe {

/// What a rank asks of a plan, as PlanArguments, and where it has it from.
struct DevicePlanArguments {
  /// Memory of the caller's on the device: PlanResult's lists of these names.
  struct Outputs {
    int32_t* receiveIndex = nullptr;        // (R,)
    int32_t* numTokensPerExpert = nullptr;  // (own experts,)
    int32_t* offsets = nullptr;             // (own experts,)
  };

  const std::byte* topkIds = nullptr;  // (T, K) int32 on the device
  int64_t numTokens = 0;
  int64_t topK = 0;
  int64_t numExperts = 0;
  int64_t align = 1;
  /// At least 0: R is this, and the host does not wait for the device.
  int64_t maxReceiveTokens = -1;
  /// Called once, when R is known.
  std::function<Outputs(size_t receiveRows)> allocate;
};

/// What all ranks of one plan know.
struct AgreedPlan {
  std::vector<PlanFacts> facts;  // by rank; the hash of the ids is zero
  uint64_t turn = 0;             // how many there have been, and their sizes
};

/// One plan, from the ids to the lists.
class DevicePlan {
 public:
  using HostWait = DeviceListPool::HostWait;

  DevicePlan(
      const DeviceLane& lane,
      DeviceListPool& pool,
      const DevicePlanArguments& arguments,
      const AgreedPlan& agreed)
      : lane_(lane),
        pool_(pool),
        topology_(lane.topology),
        arguments_(arguments),
        agreed_(agreed),
        self_(static_cast<size_t>(topology_.localRank())),
        nodes_(static_cast<size_t>(topology_.numNodes())) {
    describeSources();
  }
  ~DevicePlan() {
    // What a fault has left; else the route has taken them.
    for (const DeviceListPool::Block& block : blocks_) {
      pool_.giveBack(block);
    }
  }
  DevicePlan(const DevicePlan&) = delete;
  DevicePlan& operator=(const DevicePlan&) = delete;

  void gather() const;
  void count(DeviceBuffer& scratch);
  /// Makes the host's copy of the counts.
  void readCounts(const HostWait& wait);
  void checkIds() const;
  void list(DeviceRoute& route);

 private:
  bool isStatic() const { return arguments_.maxReceiveTokens >= 0; }
  size_t ownTokens() const { return static_cast<size_t>(arguments_.numTokens); }
  size_t topK() const { return static_cast<size_t>(arguments_.topK); }
  size_t rowBytes() const { return topK() * sizeof(int32_t); }
  /// A count that the device has found; not in the static mode.
  size_t counted(size_t word) const {
    return static_cast<size_t>(
        reinterpret_cast<const int32_t*>(counts_.host)[word]);
  }
  DeviceListPool::Block upload(std::span<const int32_t> words) const {
    return lane_.captured ? pool_.uploadNow(words) : pool_.upload(words);
  }
  void run(const auto& call) const {
    lane_.device.run(lane_.stream, [call](kernels::DeviceStream stream) {
      kernels::enqueue(call, stream);
    });
  }

  void describeSources();
  RouteLists layOut() const;
  void layOutRows(RouteLists& lists) const;
  void layOutLists(RouteLists& lists);
  void layOutWords(const RouteLists& lists);
  RouteLists::List take(size_t count) {
    const RouteLists::List list{words_, count};
    words_ += count;
    return list;
  }
  void uploadPlaces(const RouteLists& lists, kernels::ListPlan& call);
  void point(const RouteLists& lists, kernels::ListPlan& call) const;
  uint64_t fingerprint() const;
  RouteHeader header(const RouteLists& lists) const;

  const DeviceLane& lane_;
  DeviceListPool& pool_;
  const Topology& topology_;
  const DevicePlanArguments& arguments_;
  const AgreedPlan& agreed_;
  const size_t self_;
  const size_t nodes_;
  std::vector<kernels::PlanSource> sources_;
  std::vector<size_t> idsRows_;  // by local rank: of the ids that it lands
  kernels::CountPlan count_;
  DeviceListPool::Block counts_;
  DeviceListPool::Block block_;
  DeviceRoute::Planned planned_;
  size_t words_ = 0;  // of block_
  std::vector<DeviceListPool::Block> blocks_;
};

}  // namespace automoe
