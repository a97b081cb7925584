// SPDX-License-Identifier: Apache-2.0
#include "process_group/memory/segment.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"

namespace automoe {

Segment::Segment(FileDescriptor memory, size_t bytes)
    : memory_(std::move(memory)), bytes_(bytes) {
  void* data = ::mmap(
      nullptr,
      bytes,
      PROT_READ | PROT_WRITE,
      MAP_SHARED | MAP_NORESERVE,
      memory_.get(),
      0);
  if (data == MAP_FAILED) {
    throw TransportError(concat(
        "cannot map ", bytes, " bytes of node memory: ", strerror(errno)));
  }
  data_ = static_cast<std::byte*>(data);
}

Segment::Segment(Segment&& other) noexcept
    : memory_(std::move(other.memory_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

Segment::~Segment() {
  if (data_ != nullptr) {
    ::munmap(data_, bytes_);
  }
}

Segment Segment::create(uint64_t process, size_t bytes) {
  FileDescriptor memory(
      ::memfd_create("automoe", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!memory.valid() ||
      ::ftruncate(memory.get(), static_cast<off_t>(bytes)) != 0) {
    throw TransportError(concat(
        "cannot make ", bytes, " bytes of node memory: ", strerror(errno)));
  }
  // Mates may rely on the size: an access can then never raise SIGBUS.
  ::fcntl(memory.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
  Segment segment(std::move(memory), bytes);
  SegmentHeader& header = segment.header();
  header.magic = SegmentHeader::kMagic;
  header.process = process;
  AUTOMOE_CHECK(
      ::getrandom(&header.proof, sizeof(header.proof), 0) ==
          sizeof(header.proof),
      "getrandom failed");
  return segment;
}

Segment Segment::attach(FileDescriptor memory, uint64_t process, size_t bytes) {
  struct stat status = {};
  const int seals = ::fcntl(memory.get(), F_GET_SEALS);
  if (::fstat(memory.get(), &status) != 0 || bytes < kHeaderBytes ||
      status.st_size < 0 || static_cast<size_t>(status.st_size) != bytes ||
      seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    throw TransportError(concat(
        "a node-mate offered memory of ",
        status.st_size,
        " bytes, expected a sealed memfd of ",
        bytes));
  }
  Segment segment(std::move(memory), bytes);
  const SegmentHeader& header = segment.header();
  if (header.magic != SegmentHeader::kMagic || header.process != process) {
    throw TransportError("the memory of a node-mate does not read back");
  }
  return segment;
}

std::byte* Segment::at(uint64_t offset, uint64_t bytes) const {
  if (offset > bytes_ || bytes > bytes_ - offset) {
    throw TransportError(concat(
        "range ",
        offset,
        "+",
        bytes,
        " is outside a node memory of ",
        bytes_,
        " bytes"));
  }
  return data_ + offset;
}

void Segment::discard(size_t offset, size_t bytes) const {
  ::fallocate(
      memory_.get(),
      FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
      static_cast<off_t>(offset),
      static_cast<off_t>(bytes));
}

}  // namespace automoe
