// SPDX-License-Identifier: Apache-2.0
// Barrier: the ranks of a node tell its first one, the first ones of all nodes
// tell one another, and each tells its node.
#include <vector>

#include "process_group/exchange/schedule_parts.hpp"
#include "process_group/exchange/schedules.hpp"

namespace automoe {
namespace {

constexpr uint32_t kArrived = 0;
constexpr uint32_t kAllArrived = 1;
constexpr uint32_t kFirstRound = 2;

}  // namespace

Schedule makeBarrier(const Topology& topology) {
  Schedule schedule;
  const std::span<const int> mates = topology.ranksOf(topology.node());
  const int leader = mates[0];
  if (topology.rank() != leader) {
    schedule.send(leader, kArrived, nullptr, 0);
    schedule.receive(leader, kAllArrived, nullptr, 0);
    return schedule;
  }
  std::vector<Schedule::Id> heard;
  for (const int mate : mates.subspan(1)) {
    heard.push_back(schedule.receive(mate, kArrived, nullptr, 0));
  }
  // Dissemination: after round i a leader has heard, through others, of the
  // 2^(i + 1) - 1 nodes before its own.
  const int nodes = topology.numNodes();
  uint32_t round = kFirstRound;
  for (int distance = 1; distance < nodes; distance *= 2, ++round) {
    const int to = nodeAfter(topology, topology.node(), distance);
    const int from = nodeAfter(topology, topology.node(), nodes - distance);
    schedule.send(topology.ranksOf(to)[0], round, nullptr, 0, heard);
    heard.push_back(
        schedule.receive(topology.ranksOf(from)[0], round, nullptr, 0));
  }
  sendToMates(schedule, topology, kAllArrived, nullptr, 0, heard);
  return schedule;
}

}  // namespace automoe
