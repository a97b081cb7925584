// SPDX-License-Identifier: Apache-2.0
#include "nccl_library/channels.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace automoe::nccl_library {
namespace {

constexpr size_t kHeadBytes = 4096;

/// Calls `copy(place in the ring, place in the bytes, length)`, twice at its
/// end.
template <class Copy>
void inRing(uint64_t begin, size_t bytes, const Copy& copy) {
  const size_t at = begin % Channel::kBytes;
  const size_t first = std::min(bytes, Channel::kBytes - at);
  copy(at, 0, first);
  copy(0, first, bytes - first);
}

}  // namespace

size_t Channel::put(const std::byte* from, size_t bytes) {
  const uint64_t begin = written.load(std::memory_order_relaxed);
  const size_t used = begin - read.load(std::memory_order_acquire);
  const size_t count = std::min(bytes, kBytes - used);
  inRing(begin, count, [&](size_t at, size_t of, size_t length) {
    std::memcpy(data + at, from + of, length);
  });
  written.store(begin + count, std::memory_order_release);
  return count;
}

size_t Channel::take(std::byte* to, size_t bytes) {
  const uint64_t begin = read.load(std::memory_order_relaxed);
  const size_t there = written.load(std::memory_order_acquire) - begin;
  const size_t count = std::min(bytes, there);
  inRing(begin, count, [&](size_t at, size_t of, size_t length) {
    std::memcpy(to + of, data + at, length);
  });
  read.store(begin + count, std::memory_order_release);
  return count;
}

Channels::Channels(const std::string& name, int size)
    : path_("/dev/shm/" + name), size_(size) {
  const auto ranks = static_cast<size_t>(size);
  bytes_ = kHeadBytes + ranks * ranks * sizeof(Channel);
  const int file = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (file < 0 || ftruncate(file, static_cast<off_t>(bytes_)) != 0) {
    throw std::runtime_error("cannot make " + path_);
  }
  void* memory =
      mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (memory == MAP_FAILED) {
    throw std::runtime_error("cannot map " + path_);
  }
  head_ = static_cast<Head*>(memory);
  channels_ =
      reinterpret_cast<Channel*>(static_cast<std::byte*>(memory) + kHeadBytes);
  if (++head_->joined == size_) {
    unlink(path_.c_str());  // whoever needs it has it
  }
}

Channels::~Channels() {
  if (!complete()) {
    unlink(path_.c_str());  // nobody else will do that
  }
  munmap(head_, bytes_);
}

bool Channels::complete() const {
  return head_->joined == size_;
}

Channel& Channels::channel(int from, int to) {
  return channels_[from * size_ + to];
}

}  // namespace automoe::nccl_library
