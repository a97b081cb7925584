// SPDX-License-Identifier: Apache-2.0
// Calls of the tests' NCCL: what moves between ranks, as work of a stream.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda_library/streams.hpp"
#include "nccl_library/channels.hpp"

namespace automoe::nccl_library {

struct Communicator {
  Communicator(const std::string& name, int ranks, int own)
      : channels(name, ranks), size(ranks), rank(own) {}

  Channels channels;
  const int size;
  const int rank;
  std::atomic<bool> aborted = false;
};
using Shared = std::shared_ptr<Communicator>;

struct Move {
  bool sends;
  std::byte* data;
  size_t bytes;
  int peer;
};

/// What a call enqueues; `finish` comes when all has moved.
struct Call {
  Shared communicator;
  cudaStream_t stream;
  std::vector<Move> moves;
  std::function<void()> finish = [] {};
};

/// Enqueues it, or, in a group, leaves that to the group's end.
void post(Call call);
void beginGroup();
/// One piece of work for each stream: all of a group moves at once.
void endGroup();

}  // namespace automoe::nccl_library
