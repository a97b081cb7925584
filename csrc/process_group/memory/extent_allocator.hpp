// SPDX-License-Identifier: Apache-2.0
// Which parts of a segment are free: offsets only, no memory is touched.
#pragma once

#include <cstddef>
#include <map>
#include <optional>

namespace automoe {

/// First-fit allocator over [begin, end). Offsets and sizes are multiples of
/// 64 bytes (a cache line). Not thread-safe.
class ExtentAllocator {
 public:
  static constexpr size_t kAlignment = 64;

  ExtentAllocator(size_t begin, size_t end);

  /// Offset of a free extent of at least `bytes`, nothing when none is left.
  std::optional<size_t> allocate(size_t bytes);
  /// Gives back an extent; throws Error for an offset that is not allocated.
  /// Returns the size that became free.
  size_t release(size_t offset);

  size_t allocatedBytes() const { return allocatedBytes_; }
  size_t numExtents() const { return used_.size(); }

 private:
  std::map<size_t, size_t> free_;  // offset -> bytes, no two adjacent
  std::map<size_t, size_t> used_;
  size_t allocatedBytes_ = 0;
};

}  // namespace automoe
