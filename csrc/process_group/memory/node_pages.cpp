// SPDX-License-Identifier: Apache-2.0
#include "process_group/memory/node_pages.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

size_t toPages(size_t bytes) {
  static const auto page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

}  // namespace

NodePages::NodePages(const Segment& segment, uint64_t offset, size_t bytes)
    : bytes_(toPages(bytes)), offset_(offset) {
  segment.at(offset, bytes_);  // is inside
  void* data = ::mmap(
      nullptr,
      bytes_,
      PROT_READ | PROT_WRITE,
      MAP_SHARED,
      segment.fd(),
      static_cast<off_t>(offset));
  if (data == MAP_FAILED) {
    throw TransportError(concat(
        "cannot map ",
        bytes_,
        " bytes of node memory once more: ",
        strerror(errno)));
  }
  data_ = static_cast<std::byte*>(data);
}

NodePages::NodePages(NodePages&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(other.bytes_),
      offset_(other.offset_),
      extent_(other.extent_) {}

NodePages::~NodePages() {
  if (data_ != nullptr) {
    ::munmap(data_, bytes_);
  }
}

NodePages NodePages::make(NodeMemory& memory, size_t bytes) {
  // Extents are aligned to less than a page.
  const auto extent = memory.allocate(toPages(bytes) + toPages(1), 1);
  if (!extent.has_value()) {
    throw TransportError(concat(
        "node memory has no ",
        bytes,
        " bytes left for flags of devices; wait for pending operations first"));
  }
  NodePages pages(memory.segment(), toPages(extent->offset), bytes);
  pages.extent_ = {extent->offset};
  std::memset(pages.data_, 0, pages.bytes_);
  return pages;
}

NodePages NodePages::attach(
    const Segment& segment, uint64_t offset, size_t bytes) {
  return NodePages(segment, offset, bytes);
}

void NodePages::giveBack(NodeMemory& memory, Extent extent) {
  NodeMemory::doneReading(memory.segment(), extent.offset);
}

}  // namespace automoe
