// SPDX-License-Identifier: Apache-2.0
// Anonymous memory of one process that its node-mates map.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "process_group/common/file_descriptor.hpp"

namespace automoe {

/// First page of every segment. Mates read all of it and write `sleeping`.
struct SegmentHeader {
  static constexpr uint64_t kMagic = 0x6d656d2d656f6d61;  // "amoe-mem"

  uint64_t magic;
  uint64_t process;  // id of the owner
  uint64_t proof;    // random; who can say it has mapped this memory
  /// 1 while the owner sleeps and wants its doorbell rung.
  alignas(64) std::atomic<uint32_t> sleeping;
  /// Counts failures of groups. A reader of the owner's tensors compares it
  /// before and after: after a failure the tensors may be gone.
  alignas(64) std::atomic<uint64_t> failures;
};

/// A mapped memfd: nothing in any file system, gone with its last process.
/// Pages take memory once they are touched.
class Segment {
 public:
  static constexpr size_t kHeaderBytes = 4096;

  /// Makes the segment of this process.
  static Segment create(uint64_t process, size_t bytes);
  /// Maps a mate's segment and checks size and header; throws TransportError.
  static Segment attach(FileDescriptor memory, uint64_t process, size_t bytes);

  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&&) = delete;
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment();

  SegmentHeader& header() const {
    return *reinterpret_cast<SegmentHeader*>(data_);
  }
  /// [offset, offset + bytes) of the segment; throws TransportError when that
  /// is not inside it (offsets come from peers).
  std::byte* at(uint64_t offset, uint64_t bytes) const;
  size_t bytes() const { return bytes_; }
  int fd() const { return memory_.get(); }
  /// Returns the pages of a range to the system; the range reads as zeros.
  void discard(size_t offset, size_t bytes) const;

 private:
  Segment(FileDescriptor memory, size_t bytes);

  FileDescriptor memory_;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace automoe
