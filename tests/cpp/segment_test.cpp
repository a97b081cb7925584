// SPDX-License-Identifier: Apache-2.0
// A segment: what attach() believes, and what at() lets through.
#include "process_group/memory/segment.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

constexpr size_t kBytes = size_t{1} << 16;

FileDescriptor copyOf(const Segment& segment) {
  return FileDescriptor(::fcntl(segment.fd(), F_DUPFD_CLOEXEC, 0));
}

/// A memfd that holds a good header, with or without the seals.
FileDescriptor memoryFile(uint64_t process, size_t bytes, unsigned seals) {
  FileDescriptor memory(
      ::memfd_create("automoe-test", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  SegmentHeader header = {};
  header.magic = SegmentHeader::kMagic;
  header.process = process;
  EXPECT_EQ(::ftruncate(memory.get(), static_cast<off_t>(bytes)), 0);
  const size_t size = std::min(bytes, sizeof(header));
  EXPECT_EQ(
      ::pwrite(memory.get(), &header, size, 0), static_cast<ssize_t>(size));
  EXPECT_EQ(::fcntl(memory.get(), F_ADD_SEALS, seals), 0);
  return memory;
}

TEST(SegmentTest, AttachedMemoryIsTheSameMemory) {
  const Segment own = Segment::create(7, kBytes);
  const Segment mates = Segment::attach(copyOf(own), 7, kBytes);
  EXPECT_EQ(mates.header().proof, own.header().proof);
  std::memset(own.at(5000, 10), 0x21, 10);
  EXPECT_EQ(std::memcmp(mates.at(5000, 10), own.at(5000, 10), 10), 0);
  mates.header().sleeping.store(1);
  EXPECT_EQ(own.header().sleeping.load(), 1);
}

TEST(SegmentTest, EachHasAProofOfItsOwn) {
  const Segment first = Segment::create(7, kBytes);
  const Segment second = Segment::create(7, kBytes);
  EXPECT_NE(first.header().proof, second.header().proof);
}

TEST(SegmentTest, SizeCannotChangeAfterCreation) {
  const Segment own = Segment::create(7, kBytes);
  EXPECT_NE(::ftruncate(own.fd(), kBytes / 2), 0);
  EXPECT_NE(::ftruncate(own.fd(), kBytes * 2), 0);
}

TEST(SegmentTest, AttachRefusesAWrongSize) {
  const Segment own = Segment::create(7, kBytes);
  EXPECT_THROW(Segment::attach(copyOf(own), 7, kBytes * 2), TransportError);
  EXPECT_THROW(Segment::attach(copyOf(own), 7, kBytes - 1), TransportError);
  EXPECT_THROW(Segment::attach(copyOf(own), 7, 0), TransportError);
}

TEST(SegmentTest, AttachRefusesMemoryTooSmallForItsHeader) {
  FileDescriptor memory =
      memoryFile(7, Segment::kHeaderBytes - 1, F_SEAL_SHRINK);
  EXPECT_THROW(
      Segment::attach(std::move(memory), 7, Segment::kHeaderBytes - 1),
      TransportError);
}

TEST(SegmentTest, AttachRefusesMemoryThatMayShrink) {
  EXPECT_NO_THROW(
      Segment::attach(memoryFile(7, kBytes, F_SEAL_SHRINK), 7, kBytes));
  EXPECT_THROW(
      Segment::attach(memoryFile(7, kBytes, F_SEAL_GROW), 7, kBytes),
      TransportError);
}

TEST(SegmentTest, AttachRefusesTheMemoryOfAnotherProcess) {
  const Segment own = Segment::create(7, kBytes);
  EXPECT_THROW(Segment::attach(copyOf(own), 8, kBytes), TransportError);
}

TEST(SegmentTest, AttachRefusesMemoryWithoutItsMark) {
  const Segment own = Segment::create(7, kBytes);
  own.header().magic += 1;
  EXPECT_THROW(Segment::attach(copyOf(own), 7, kBytes), TransportError);
}

TEST(SegmentTest, AttachRefusesWhatIsNotMemory) {
  EXPECT_THROW(
      Segment::attach(FileDescriptor(::eventfd(0, EFD_CLOEXEC)), 7, kBytes),
      TransportError);
  EXPECT_THROW(
      Segment::attach(
          FileDescriptor(::open("/dev/zero", O_RDWR | O_CLOEXEC)), 7, kBytes),
      TransportError);
  EXPECT_THROW(Segment::attach(FileDescriptor(), 7, kBytes), TransportError);
}

TEST(SegmentTest, AttachRefusesReadOnlyMemory) {
  const Segment own = Segment::create(7, kBytes);
  const std::string path = concat("/proc/self/fd/", own.fd());
  FileDescriptor readOnly(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_TRUE(readOnly.valid());
  EXPECT_THROW(Segment::attach(std::move(readOnly), 7, kBytes), TransportError);
}

TEST(SegmentTest, RangesInsideAreGivenOut) {
  const Segment own = Segment::create(7, kBytes);
  EXPECT_EQ(own.at(0, kBytes), own.at(0, 0));
  EXPECT_EQ(own.at(kBytes, 0), own.at(0, 0) + kBytes);
  EXPECT_EQ(own.at(kBytes - 1, 1), own.at(0, 0) + kBytes - 1);
}

TEST(SegmentTest, RangesOutsideAreErrors) {
  const Segment own = Segment::create(7, kBytes);
  constexpr uint64_t kMost = ~uint64_t{0};
  const std::pair<uint64_t, uint64_t> ranges[] = {
      {0, kBytes + 1},
      {1, kBytes},
      {kBytes, 1},
      {kBytes + 1, 0},
      {kMost, 0},
      {kMost, 1},
      {kMost - 63, 64},  // the sum wraps to 0
      {1, kMost},
      {64, kMost - 63},
      {kBytes / 2, kMost - kBytes / 2 + 1}};
  for (const auto& [offset, bytes] : ranges) {
    EXPECT_THROW(own.at(offset, bytes), TransportError)
        << offset << "+" << bytes;
  }
}

TEST(SegmentTest, MovedSegmentKeepsItsMemory) {
  Segment first = Segment::create(7, kBytes);
  std::memset(first.at(5000, 1), 0x42, 1);
  const Segment second = std::move(first);
  EXPECT_EQ(*second.at(5000, 1), std::byte{0x42});
  EXPECT_EQ(second.bytes(), kBytes);
}

TEST(SegmentTest, DescriptorsAreClosedWithTheSegment) {
  int fd = -1;
  {
    const Segment own = Segment::create(7, kBytes);
    fd = own.fd();
    ASSERT_NE(::fcntl(fd, F_GETFD), -1);
  }
  EXPECT_EQ(::fcntl(fd, F_GETFD), -1);
}

}  // namespace
}  // namespace automoe
