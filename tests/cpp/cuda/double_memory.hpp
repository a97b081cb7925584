// SPDX-License-Identifier: Apache-2.0
// Memory of the test double: which rank may use what, and until when.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "process_group/device/device.hpp"

namespace automoe::testing {

/// What every byte is before it is written and after it is freed.
inline constexpr int kPoison = 0xCB;

/// Methods throw DeviceError. The caller holds the lock of the streams.
class DoubleMemory {
 public:
  enum class Place { kDevice, kPageLocked, kMapped, kPageable };

  DoubleMemory() = default;
  DoubleMemory(const DoubleMemory&) = delete;
  DoubleMemory& operator=(const DoubleMemory&) = delete;
  ~DoubleMemory();

  std::byte* allocate(int rank, size_t bytes, Place place);
  /// Keeps it poisoned, so that its address names nothing else; returns what
  /// was wrong with that, or nothing.
  std::string free(int rank, std::byte* memory, Place place);
  /// From now on memory of the caller is memory of the rank's device.
  void adopt(int rank, std::byte* memory, size_t bytes);
  void disown(int rank, std::byte* memory);

  /// The same for pages of the host.
  void map(int rank, std::byte* pages, size_t bytes);
  void unmap(int rank, std::byte* pages);

  Device::Handle exportMemory(int rank, const std::byte* memory) const;
  std::byte* open(int rank, const Device::Handle& handle);
  void close(int rank, const std::byte* memory);

  /// Where the bytes are, if the rank may use all of them.
  Place use(int rank, const std::byte* memory, size_t bytes) const;
  /// "device memory 3 of rank 1 + 64"
  std::string describe(const std::byte* memory) const;
  std::vector<std::string> leaks(int rank) const;

 private:
  struct Block {
    uint64_t number = 0;
    int rank = 0;
    Place place = Place::kDevice;
    std::byte* begin = nullptr;
    size_t bytes = 0;
    bool adopted = false;
    bool live = true;
    std::map<int, int> opened = {};  // rank -> how often

    std::string name() const;
  };

  const Block* find(const std::byte* memory) const;
  Block& ownBlock(int rank, const std::byte* memory);
  void checkFree(const std::byte* memory, size_t bytes) const;

  std::map<const std::byte*, Block> blocks_;  // by their begin
  uint64_t nextNumber_ = 0;
};

}  // namespace automoe::testing
