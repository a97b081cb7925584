// SPDX-License-Identifier: Apache-2.0
// The registry of memory of the test double.
#include "cuda/double_memory.hpp"

#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)0)
#endif

namespace automoe::testing {

namespace {

constexpr auto kAlignment = std::align_val_t{256};
constexpr uint64_t kMagic = 0x656c626972646e61;

struct HandleContent {
  uint64_t magic = kMagic;
  uint64_t number = 0;
  const std::byte* begin = nullptr;
  int rank = 0;
};
static_assert(sizeof(HandleContent) <= sizeof(Device::Handle));

}  // namespace

std::string DoubleMemory::Block::name() const {
  return concat(
      place == Place::kDevice   ? "device"
      : place == Place::kMapped ? "mapped"
                                : "page-locked",
      " memory ",
      number,
      " of rank ",
      rank);
}

DoubleMemory::~DoubleMemory() {
  for (const auto& [begin, block] : blocks_) {
    if (!block.adopted) {
      ASAN_UNPOISON_MEMORY_REGION(block.begin, block.bytes);
      ::operator delete(block.begin, kAlignment);
    }
  }
}

std::byte* DoubleMemory::allocate(int rank, size_t bytes, Place place) {
  if (bytes == 0) {
    return nullptr;  // as CUDA does
  }
  auto* memory = static_cast<std::byte*>(::operator new(bytes, kAlignment));
  std::memset(memory, kPoison, bytes);
  blocks_[memory] = {nextNumber_++, rank, place, memory, bytes};
  return memory;
}

std::string DoubleMemory::free(int rank, std::byte* memory, Place place) {
  Block& block = ownBlock(rank, memory);
  if (block.place != place || block.adopted) {
    throw DeviceError(
        concat(block.name(), " does not come from this kind of allocate"));
  }
  block.live = false;
  std::memset(memory, kPoison, block.bytes);
  ASAN_POISON_MEMORY_REGION(memory, block.bytes);
  if (!block.opened.empty()) {
    return concat(
        block.name(),
        " is freed while rank ",
        block.opened.begin()->first,
        " has it open");
  }
  return "";
}

void DoubleMemory::adopt(int rank, std::byte* memory, size_t bytes) {
  checkFree(memory, bytes);
  blocks_[memory] = {nextNumber_++, rank, Place::kDevice, memory, bytes, true};
}

void DoubleMemory::disown(int rank, std::byte* memory) {
  const Block& block = ownBlock(rank, memory);
  if (!block.adopted || block.place == Place::kMapped) {
    throw DeviceError(describe(memory) + " was not adopted");
  }
  blocks_.erase(memory);
}

void DoubleMemory::map(int rank, std::byte* pages, size_t bytes) {
  checkFree(pages, bytes);
  blocks_[pages] = {nextNumber_++, rank, Place::kMapped, pages, bytes, true};
}

void DoubleMemory::unmap(int rank, std::byte* pages) {
  if (ownBlock(rank, pages).place != Place::kMapped) {
    throw DeviceError(describe(pages) + " was not mapped");
  }
  blocks_.erase(pages);
}

Device::Handle DoubleMemory::exportMemory(
    int rank, const std::byte* memory) const {
  const Block* block = find(memory);
  if (block == nullptr || block->begin != memory || !block->live ||
      block->rank != rank || block->adopted || block->place != Place::kDevice) {
    throw DeviceError(
        describe(memory) + " cannot be exported: it is not what allocate() " +
        concat("of rank ", rank, " returned"));
  }
  const HandleContent content = {kMagic, block->number, block->begin, rank};
  Device::Handle handle;
  std::memcpy(handle.bytes.data(), &content, sizeof(content));
  return handle;
}

std::byte* DoubleMemory::open(int rank, const Device::Handle& handle) {
  HandleContent content;
  std::memcpy(&content, handle.bytes.data(), sizeof(content));
  const auto found =
      content.magic == kMagic ? blocks_.find(content.begin) : blocks_.end();
  if (found == blocks_.end() || found->second.number != content.number) {
    throw DeviceError("openMemory: not a handle of exportMemory()");
  }
  Block& block = found->second;
  if (block.rank == rank) {
    throw DeviceError(
        "openMemory: " + block.name() + " was exported by the same process");
  }
  if (!block.live) {
    throw DeviceError("openMemory: " + block.name() + " was freed");
  }
  block.opened[rank] += 1;
  return block.begin;
}

void DoubleMemory::close(int rank, const std::byte* memory) {
  const auto found = blocks_.find(memory);
  if (found == blocks_.end() || !found->second.opened.contains(rank)) {
    throw DeviceError(concat(describe(memory), " is not open in rank ", rank));
  }
  auto& opened = found->second.opened;
  if (--opened[rank] == 0) {
    opened.erase(rank);
  }
}

DoubleMemory::Place DoubleMemory::use(
    int rank, const std::byte* memory, size_t bytes) const {
  const Block* block = find(memory);
  if (block == nullptr) {
    checkFree(memory, bytes);
    return Place::kPageable;
  }
  const auto offset = static_cast<size_t>(memory - block->begin);
  if (!block->live) {
    throw DeviceError(describe(memory) + " was freed");
  }
  if (block->rank != rank && !block->opened.contains(rank)) {
    throw DeviceError(concat(describe(memory), " is not open in rank ", rank));
  }
  if (bytes > block->bytes - offset) {
    throw DeviceError(concat(
        describe(memory),
        ": ",
        bytes,
        " bytes pass the end of its ",
        block->bytes));
  }
  return block->place;
}

std::string DoubleMemory::describe(const std::byte* memory) const {
  if (const Block* block = find(memory)) {
    return concat(block->name(), " + ", memory - block->begin);
  }
  return concat("host memory ", static_cast<const void*>(memory));
}

std::vector<std::string> DoubleMemory::leaks(int rank) const {
  std::vector<std::string> found;
  for (const auto& [begin, block] : blocks_) {
    const bool mapped = block.place == Place::kMapped;
    if (block.rank == rank && block.live && (!block.adopted || mapped)) {
      found.push_back(block.name());
    }
    if (block.opened.contains(rank)) {
      found.push_back(concat(block.name(), ", open in rank ", rank));
    }
  }
  return found;
}

// The block that the address is in, alive or not.
const DoubleMemory::Block* DoubleMemory::find(const std::byte* memory) const {
  const auto after = blocks_.upper_bound(memory);
  if (after == blocks_.begin()) {
    return nullptr;
  }
  const Block& block = std::prev(after)->second;
  const bool inside = std::less<>()(memory, block.begin + block.bytes);
  return inside ? &block : nullptr;
}

DoubleMemory::Block& DoubleMemory::ownBlock(int rank, const std::byte* memory) {
  const auto found = blocks_.find(memory);
  if (found == blocks_.end()) {
    throw DeviceError(describe(memory) + " was not allocated");
  }
  if (!found->second.live) {
    throw DeviceError(describe(memory) + " was freed before");
  }
  if (found->second.rank != rank) {
    throw DeviceError(
        concat(describe(memory), " does not belong to rank ", rank));
  }
  return found->second;
}

// No block is in these bytes.
void DoubleMemory::checkFree(const std::byte* memory, size_t bytes) const {
  const Block* inside = find(memory);
  const auto next = blocks_.upper_bound(memory);
  const bool reaches = next != blocks_.end() &&
                       static_cast<size_t>(next->first - memory) < bytes;
  if (inside != nullptr || reaches) {
    throw DeviceError(concat(
        bytes,
        " bytes from ",
        describe(memory),
        " reach into ",
        inside != nullptr ? inside->name() : next->second.name()));
  }
}

}  // namespace automoe::testing
