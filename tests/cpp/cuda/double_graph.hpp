// SPDX-License-Identifier: Apache-2.0
// Graphs of the test double: what streams get while they are in a capture is
// recorded, by the rules of CUDA's stream capture, and a launch enqueues it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/double_streams.hpp"

namespace automoe::testing {

/// A capture, and after end() the graph that it has made. Methods throw
/// DeviceError. The caller holds the lock of the streams.
class DoubleGraph {
 public:
  using Nodes = DoubleStream::Nodes;

  DoubleGraph(int rank, uint64_t number) : rank_(rank), number_(number) {}

  int rank() const { return rank_; }
  std::string name() const;

  // The capture.

  /// The item comes after what the stream has got in this capture.
  void add(DoubleStream& stream, StreamItem item);
  /// An attempt at what a capture does not allow ends it: all that is left to
  /// do is end(), which throws, as everything else does.
  void invalidate(const std::string& cause);
  void check() const;
  /// Throws where a stream that came into the capture has not been awaited by
  /// the one that began it, of which `tips` are the last nodes.
  void end(const Nodes& tips);
  bool ended() const { return ended_; }

  // The graph.

  /// Puts a launch on the stream: when it is reached, and the launch before is
  /// over, the nodes run in any order that the capture allows.
  void launch(DoubleStreams& streams, DoubleStream& stream);

 private:
  struct Node {
    StreamItem item;
    Nodes after;
  };
  struct Launch {
    bool begun = false;
    bool over = false;
  };
  using Parts = std::vector<std::shared_ptr<DoubleStream>>;

  std::shared_ptr<DoubleStream> enqueueNode(
      DoubleStreams& streams,
      size_t index,
      const std::shared_ptr<Launch>& launch,
      const Parts& before) const;

  const int rank_;
  const uint64_t number_;
  std::vector<Node> nodes_;
  std::string error_;
  bool ended_ = false;
  uint64_t launches_ = 0;
  std::shared_ptr<Launch> latest_;
};

}  // namespace automoe::testing
