// SPDX-License-Identifier: Apache-2.0
// Blocks from every rank of a node to every other, on devices: by copies alone,
// so no multiprocessor takes part.
#include "process_group/exchange/device_moves.hpp"

namespace automoe {

void enqueueAllToAll(
    const DeviceLane& lane, const DeviceAllToAllArguments& arguments) {
  const auto self = static_cast<size_t>(lane.topology.localRank());
  const auto mates = static_cast<size_t>(lane.topology.localSize());
  const size_t bytes = arguments.blockBytes;
  const auto copy = [&](std::byte* to, const std::byte* from, size_t count) {
    if (count > 0) {
      lane.device.copy(lane.stream, to, from, count);
    }
  };
  lane.memory.begin(std::vector<size_t>(mates, mates * bytes), lane.timeout);
  if (lane.fenced) {
    lane.memory.fence(lane.stream, DeviceMemory::Fence::kBegin);
  }
  std::byte* const own = lane.memory.arena(self);
  const size_t behind = (self + 1) * bytes;
  copy(own, arguments.from, self * bytes);
  copy(own + behind, arguments.from + behind, (mates - self - 1) * bytes);
  lane.memory.setReady(lane.stream);
  copy(arguments.to + self * bytes, arguments.from + self * bytes, bytes);
  lane.memory.awaitReady(lane.stream);
  // Each begins with another one, so that they do not all read from one.
  for (size_t i = 1; i < mates; ++i) {
    const size_t mate = (self + i) % mates;
    copy(
        arguments.to + mate * bytes,
        lane.memory.arena(mate) + self * bytes,
        bytes);
  }
  if (lane.fenced) {
    lane.memory.fence(lane.stream, DeviceMemory::Fence::kEnd);
  }
}

}  // namespace automoe
