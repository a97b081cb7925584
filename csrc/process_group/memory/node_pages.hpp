// SPDX-License-Identifier: Apache-2.0
// Pages of node memory that a device can have page-locked.
#pragma once

#include <cstddef>
#include <cstdint>

#include "process_group/memory/node_memory.hpp"
#include "process_group/memory/segment.hpp"

namespace automoe {

/// Whole pages in the segment of one process of the node, mapped once more: so
/// they stay, also when the engine unmaps the segment of a mate that has died.
class NodePages {
 public:
  /// In the own segment, zeros. Throws TransportError where it is full.
  static NodePages make(NodeMemory& memory, size_t bytes);
  /// Those that a mate has made with so many bytes. Throws TransportError.
  static NodePages attach(
      const Segment& segment, uint64_t offset, size_t bytes);

  NodePages(NodePages&& other) noexcept;
  NodePages& operator=(NodePages&&) = delete;
  NodePages(const NodePages&) = delete;
  NodePages& operator=(const NodePages&) = delete;
  ~NodePages();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  /// In the segment.
  uint64_t offset() const { return offset_; }
  /// Stays mapped until the process ends.
  void keepForEver() { data_ = nullptr; }

  /// Who has made them gives them back, when nobody else has them any more.
  struct Extent {
    uint64_t offset = 0;
  };
  Extent extent() const { return extent_; }
  static void giveBack(NodeMemory& memory, Extent extent);

 private:
  NodePages(const Segment& segment, uint64_t offset, size_t bytes);

  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  uint64_t offset_ = 0;
  Extent extent_;
};

}  // namespace automoe
