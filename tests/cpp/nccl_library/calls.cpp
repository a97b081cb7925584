// SPDX-License-Identifier: Apache-2.0
#include "nccl_library/calls.hpp"

#include <algorithm>
#include <tuple>
#include <utility>

namespace automoe::nccl_library {
namespace {

thread_local int depth = 0;
thread_local std::vector<Call> grouped;

/// Of a communicator, whether something is sent, and the peer.
using Way = std::tuple<const Communicator*, bool, int>;

/// As far as it gets without waiting; true at the end. Ways where something
/// waits are blocked: of what goes there, the first comes first.
bool advance(
    Communicator& on, std::vector<Move>& moves, std::vector<Way>& blocked) {
  bool done = true;
  for (Move& move : moves) {
    const Way way{&on, move.sends, move.peer};
    if (move.bytes > 0 && std::ranges::count(blocked, way) == 0) {
      const size_t moved = move.sends ? on.channels.channel(on.rank, move.peer)
                                            .put(move.data, move.bytes)
                                      : on.channels.channel(move.peer, on.rank)
                                            .take(move.data, move.bytes);
      move.data += moved;
      move.bytes -= moved;
    }
    if (move.bytes > 0) {
      blocked.push_back(way);
      done = false;
    }
  }
  return done;
}

void enqueue(std::vector<Call> calls) {
  const cudaStream_t stream = calls.front().stream;
  // Replays of a graph begin anew.
  struct Progress {
    std::vector<Move> moves;
    bool began = false;
  };
  auto progress = std::make_shared<std::vector<Progress>>(calls.size());
  cuda_library::streamOf(stream).enqueue([calls = std::move(calls), progress] {
    bool done = true;
    std::vector<Way> blocked;
    for (size_t i = 0; i < calls.size(); ++i) {
      const Call& call = calls[i];
      Progress& own = (*progress)[i];
      if (!own.began) {
        own = {call.moves, true};
      }
      done = (call.communicator->aborted ||
              advance(*call.communicator, own.moves, blocked)) &&
             done;
    }
    if (done) {
      for (size_t i = 0; i < calls.size(); ++i) {
        if (!calls[i].communicator->aborted) {
          calls[i].finish();
        }
        (*progress)[i] = {};
      }
    }
    return done;
  });
}

}  // namespace

void post(Call call) {
  if (depth > 0) {
    grouped.push_back(std::move(call));
    return;
  }
  std::vector<Call> alone;
  alone.push_back(std::move(call));
  enqueue(std::move(alone));
}

void beginGroup() {
  ++depth;
}

void endGroup() {
  if (--depth > 0) {
    return;
  }
  std::vector<Call> calls = std::exchange(grouped, {});
  while (!calls.empty()) {
    const cudaStream_t stream = calls.front().stream;
    std::vector<Call> here;
    std::vector<Call> others;
    for (Call& call : calls) {
      (call.stream == stream ? here : others).push_back(std::move(call));
    }
    enqueue(std::move(here));
    calls = std::move(others);
  }
}

}  // namespace automoe::nccl_library
