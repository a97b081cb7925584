// SPDX-License-Identifier: Apache-2.0
#include "process_group/memory/extent_allocator.hpp"

#include <algorithm>
#include <limits>

#include "process_group/common/error.hpp"

namespace automoe {

ExtentAllocator::ExtentAllocator(size_t begin, size_t end) {
  AUTOMOE_CHECK(
      begin % kAlignment == 0 && begin < end, "bad range ", begin, "..", end);
  free_.emplace(begin, (end - begin) / kAlignment * kAlignment);
}

std::optional<size_t> ExtentAllocator::allocate(size_t bytes) {
  if (bytes > std::numeric_limits<size_t>::max() - kAlignment) {
    return std::nullopt;
  }
  const size_t rounded =
      std::max(bytes + kAlignment - 1, kAlignment) / kAlignment * kAlignment;
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    const auto [offset, available] = *it;
    if (available < rounded) {
      continue;
    }
    free_.erase(it);
    if (available > rounded) {
      free_.emplace(offset + rounded, available - rounded);
    }
    used_.emplace(offset, rounded);
    allocatedBytes_ += rounded;
    return offset;
  }
  return std::nullopt;
}

size_t ExtentAllocator::release(size_t offset) {
  const auto found = used_.find(offset);
  AUTOMOE_CHECK(found != used_.end(), "no extent is allocated at ", offset);
  const size_t bytes = found->second;
  used_.erase(found);
  allocatedBytes_ -= bytes;
  auto it = free_.emplace(offset, bytes).first;
  const auto next = std::next(it);
  if (next != free_.end() && it->first + it->second == next->first) {
    it->second += next->second;
    free_.erase(next);
  }
  if (it != free_.begin()) {
    const auto previous = std::prev(it);
    if (previous->first + previous->second == it->first) {
      previous->second += it->second;
      free_.erase(it);
    }
  }
  return bytes;
}

}  // namespace automoe
