// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_route.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/route_experts.hpp"

namespace automoe {
namespace {

constexpr size_t kSmallestBlock = size_t{1} << 16;

}  // namespace

DeviceListPool::DeviceListPool(
    std::shared_ptr<Device> device, Device::Stream stream)
    : device_(std::move(device)), stream_(stream) {}

DeviceListPool::~DeviceListPool() {
  for (const Block& block : free_) {
    free(block);
  }
  if (aside_ != nullptr) {
    device_->destroyStream(aside_);
  }
}

DeviceListPool::Block DeviceListPool::upload(std::span<const int32_t> words) {
  const size_t bytes = words.size_bytes();
  Block block = takeWithTwin(bytes);
  try {
    if (bytes > 0) {
      std::memcpy(block.host, words.data(), bytes);
      device_->copy(stream_, block.device, block.host, bytes);
    }
    device_->record(block.copied, stream_);
  } catch (...) {
    giveBack(block);
    throw;
  }
  return block;
}

DeviceListPool::Block DeviceListPool::uploadNow(
    std::span<const int32_t> words) {
  const std::lock_guard lock(mutex_);
  if (aside_ == nullptr) {
    aside_ = device_->makeStream();
  }
  // New, as what others have given back may be in use on the other stream.
  Block block = make(words.size_bytes(), true);
  try {
    std::memcpy(block.host, words.data(), words.size_bytes());
    device_->copy(aside_, block.device, block.host, words.size_bytes());
    device_->synchronize(aside_);
  } catch (...) {
    free(block);
    throw;
  }
  return block;
}

void DeviceListPool::giveBack(const Block& block) {
  const std::lock_guard lock(mutex_);
  free_.push_back(block);
}

DeviceListPool::Block DeviceListPool::take(size_t bytes) {
  return find(bytes, false);
}

DeviceListPool::Block DeviceListPool::takeWithTwin(size_t bytes) {
  return find(bytes, true);
}

std::vector<int32_t> DeviceListPool::download(
    const Block& block,
    std::span<const RouteLists::List> lists,
    const HostWait& wait) {
  size_t words = 0;
  for (const RouteLists::List& list : lists) {
    words += list.count;
  }
  const Block staging = takeWithTwin(words * sizeof(int32_t));
  std::vector<int32_t> read(words);
  try {
    std::byte* to = staging.host;
    for (const RouteLists::List& list : lists) {
      const size_t bytes = list.count * sizeof(int32_t);
      const size_t begin = list.begin * sizeof(int32_t);
      device_->copy(stream_, to, block.device + begin, bytes);
      to += bytes;
    }
    device_->record(staging.copied, stream_);
    wait();
    std::memcpy(read.data(), staging.host, words * sizeof(int32_t));
  } catch (...) {
    giveBack(staging);
    throw;
  }
  giveBack(staging);
  return read;
}

DeviceListPool::Block DeviceListPool::find(size_t bytes, bool withTwin) {
  {
    const std::lock_guard lock(mutex_);
    // What is on the device is used in the order of the stream; of what is on
    // the host, copies have to have ended. The smallest that is large enough.
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      if (it->bytes >= bytes && (it->host != nullptr) == withTwin &&
          (best == free_.end() || it->bytes < best->bytes) &&
          (!withTwin || device_->happened(it->copied))) {
        best = it;
      }
    }
    if (best != free_.end()) {
      const Block found = *best;
      free_.erase(best);
      return found;
    }
  }
  return make(bytes, withTwin);
}

DeviceListPool::Block DeviceListPool::make(size_t bytes, bool withTwin) {
  Block made;
  made.bytes = std::max(std::bit_ceil(bytes), kSmallestBlock);
  try {
    if (withTwin) {
      made.copied = device_->makeEvent();
      made.host = device_->allocateHost(made.bytes);
    }
    made.device = device_->allocate(made.bytes);
  } catch (...) {
    free(made);
    throw;
  }
  return made;
}

void DeviceListPool::free(const Block& block) {
  if (block.device != nullptr) {
    device_->free(block.device);
  }
  if (block.host != nullptr) {
    device_->freeHost(block.host);
  }
  if (block.copied != nullptr) {
    device_->destroyEvent(block.copied);
  }
}

DeviceRoute::DeviceRoute(
    std::shared_ptr<DeviceListPool> pool, RouteLists lists, bool captured)
    : pool_(std::move(pool)),
      lists_(std::move(lists)),
      block_(
          captured ? pool_->uploadNow(lists_.words)
                   : pool_->upload(lists_.words)) {
  lists_.words = {};
}

DeviceRoute::DeviceRoute(std::shared_ptr<DeviceListPool> pool)
    : pool_(std::move(pool)) {}

DeviceRoute::~DeviceRoute() {
  if (planned_.has_value()) {
    pool_->giveBack(planned_->counts);
  }
  for (const DeviceListPool::Block& block : others_) {
    pool_->giveBack(block);
  }
  if (block_.device != nullptr) {
    pool_->giveBack(block_);
  }
}

void DeviceRoute::fill(
    RouteLists lists,
    DeviceListPool::Block block,
    Planned planned,
    std::vector<DeviceListPool::Block> others) {
  lists_ = std::move(lists);
  block_ = block;
  planned_ = std::move(planned);
  others_ = std::move(others);
}

const int32_t* DeviceRoute::at(
    const RouteLists::List& list, size_t first) const {
  return reinterpret_cast<const int32_t*>(block_.device) + list.begin + first;
}

std::vector<int32_t> DeviceRoute::headerWords() const {
  AUTOMOE_CHECK(planned_.has_value(), "a route that the host has made");
  RouteHeader header = planned_->header;
  header.magic = RouteHeader::kOnDevice;
  std::vector<int32_t> words(kRouteHeaderWords);
  writeRouteHeader(header, words);
  return words;
}

std::vector<int32_t> readCounts(
    const DeviceRoute& route, const DeviceListPool::HostWait& wait) {
  const DeviceRoute::Planned* planned = route.planned();
  AUTOMOE_CHECK(planned != nullptr, "a route that the host has made");
  const RouteLists::List all[] = {{0, planned->at.words}};
  return route.pool().download(planned->counts, all, wait);
}

std::vector<int32_t> readWords(
    const DeviceRoute& route,
    const Topology& topology,
    std::span<const int32_t> counts,
    const DeviceListPool::HostWait& wait) {
  const DeviceRoute::Planned& planned = *route.planned();
  const kernels::PlanCounts& at = planned.at;
  RouteHeader header = planned.header;
  const auto nodes = static_cast<size_t>(header.numNodes);
  const auto size = static_cast<size_t>(header.size);
  header.numDropped = counts[at.dropped];
  header.numSendRows = counts[at.sendBegin + nodes];
  header.numSlots = counts[at.sendSlotBegin + nodes];
  header.numLandRows = counts[at.landBegin + size];
  header.numEntries = counts[at.entryBegin + size];
  std::vector<int32_t> words(numRouteWords(header));
  writeRouteHeader(header, words);
  const auto sections = sectionsOf(header, std::span(words));
  for (size_t rank = 0; rank < size; ++rank) {
    sections.nodeOfRank[rank] = topology.nodeOf(static_cast<int>(rank));
  }
  std::ranges::copy(sections.nodeOfRank, sections.reductionMap.begin());
  const auto take = [](auto from, auto to) {
    std::ranges::copy(from.first(to.size()), to.begin());
    return from.subspan(to.size());
  };
  take(counts.subspan(at.sendBegin), sections.sendBegin);
  take(counts.subspan(at.landBegin), sections.landBegin);
  const RouteLists::List used[] = {
      {planned.tokens.begin, sections.sendTokens.size()},
      {planned.slotBegins.begin, sections.slotBegin.size()},
      {planned.slots.begin, sections.slots.size()},
      {planned.entryBegins.begin, sections.entryBegin.size()},
      {planned.entries.begin, sections.entries.size()}};
  const std::vector<int32_t> read =
      route.pool().download(route.block(), used, wait);
  std::span<const int32_t> rest = read;
  rest = take(rest, sections.sendTokens);
  rest = take(rest, sections.slotBegin);
  rest = take(rest, sections.slots);
  rest = take(rest, sections.entryBegin);
  take(rest, sections.entries);
  return words;
}

std::vector<int32_t> offsetsOf(
    const DeviceRoute& route,
    const Topology& topology,
    std::span<const int32_t> counts) {
  const DeviceRoute::Planned& planned = *route.planned();
  const RouteHeader& header = planned.header;
  const int64_t chunk = expertsPerRank(header.numExperts, header.size);
  const auto ends = counts.subspan(
      planned.at.expertEnds +
      static_cast<size_t>(topology.localRank() * chunk));
  std::vector<int32_t> offsets(static_cast<size_t>(
      numExpertsOf(header.rank, header.numExperts, header.size)));
  for (size_t expert = 0; expert < offsets.size(); ++expert) {
    offsets[expert] = static_cast<int32_t>(
        std::min<int64_t>(ends[expert], header.numReceiveRows));
  }
  return offsets;
}

}  // namespace automoe
