// SPDX-License-Identifier: Apache-2.0
// What the ranks of a communicator of the tests' NCCL share: a ring of bytes
// from each to each.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace automoe::nccl_library {

/// A ring of bytes from one rank to another, in memory of both.
struct Channel {
  static constexpr size_t kBytes = size_t{256} << 10;

  std::atomic<uint64_t> written;
  std::atomic<uint64_t> read;
  std::byte data[kBytes];

  /// How many bytes went in, or came out: those that there was room or data
  /// for.
  size_t put(const std::byte* from, size_t bytes);
  size_t take(std::byte* to, size_t bytes);
};

/// The memory of all ranks of one communicator, which has no name any more once
/// all have it.
class Channels {
 public:
  Channels(const std::string& name, int size);
  ~Channels();
  Channels(const Channels&) = delete;
  Channels& operator=(const Channels&) = delete;

  bool complete() const;  // all ranks are there
  Channel& channel(int from, int to);

 private:
  struct Head {
    std::atomic<int> joined;
  };

  const std::string path_;
  const int size_;
  size_t bytes_ = 0;
  Head* head_ = nullptr;
  Channel* channels_ = nullptr;
};

}  // namespace automoe::nccl_library
