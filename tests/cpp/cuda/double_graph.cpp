// SPDX-License-Identifier: Apache-2.0
// Captures of the test double, and launches of what they have made.
#include "cuda/double_graph.hpp"

#include <algorithm>
#include <utility>

#include "cuda/double_device.hpp"
#include "cuda/double_state.hpp"

namespace automoe::testing {

std::string DoubleGraph::name() const {
  return concat("graph ", number_, " of rank ", rank_);
}

void DoubleGraph::add(DoubleStream& stream, StreamItem item) {
  check();
  nodes_.push_back({std::move(item), std::move(stream.tips)});
  stream.tips = {nodes_.size() - 1};
}

void DoubleGraph::invalidate(const std::string& cause) {
  if (error_.empty() && !ended_) {
    error_ = cause;
  }
}

void DoubleGraph::check() const {
  if (!error_.empty()) {
    throw DeviceError(concat("the capture of ", name(), " failed: ", error_));
  }
}

void DoubleGraph::end(const Nodes& tips) {
  ended_ = true;
  check();
  // Nodes come after nodes of lower numbers.
  std::vector<bool> joined(nodes_.size(), false);
  for (const size_t tip : tips) {
    joined[tip] = true;
  }
  for (size_t i = nodes_.size(); i-- > 0;) {
    if (!joined[i]) {
      error_ = concat(
          "the stream that began it does not await \"",
          nodes_[i].item.what(),
          "\" of another stream");
      check();
    }
    for (const size_t before : nodes_[i].after) {
      joined[before] = true;
    }
  }
}

void DoubleGraph::launch(DoubleStreams& streams, DoubleStream& stream) {
  check();
  const std::string text =
      concat("launch ", ++launches_, " of graph ", number_);
  const auto previous = std::exchange(latest_, std::make_shared<Launch>());
  const auto launch = latest_;
  streams.enqueue(
      stream,
      {[text] { return "begin " + text; },
       [previous] { return previous == nullptr || previous->over; },
       [launch] { return launch->begun = true; }});
  Parts parts;
  for (size_t i = 0; i < nodes_.size(); ++i) {
    parts.push_back(enqueueNode(streams, i, launch, parts));
  }
  streams.enqueue(
      stream,
      {[text] { return "end " + text; },
       [parts = std::move(parts)] {
         return std::ranges::all_of(
             parts, [](const auto& part) { return part->done > 0; });
       },
       [launch] { return launch->over = true; }});
}

// A stream of its own for each node, so that any order may be chosen.
std::shared_ptr<DoubleStream> DoubleGraph::enqueueNode(
    DoubleStreams& streams,
    size_t index,
    const std::shared_ptr<Launch>& launch,
    const Parts& before) const {
  const Node& node = nodes_[index];
  Parts awaited;
  for (const size_t other : node.after) {
    awaited.push_back(before[other]);
  }
  const auto part = streams.makeForNode(rank_, [launch, awaited] {
    return launch->begun && std::ranges::all_of(awaited, [](const auto& each) {
             return each->done > 0;
           });
  });
  StreamItem item = node.item.again ? node.item.again(part) : node.item;
  item.what = [name = name(), launch = launches_, index, what = item.what] {
    return concat(name, ", launch ", launch, ", node ", index, ": ", what());
  };
  streams.enqueue(*part, std::move(item));
  return part;
}

// ---- What the test asks of the world ----

void DoubleWorld::beginCapture(int rank, Device::Stream stream) {
  state_->call(rank, "beginCapture", [&](auto&) {
    const auto found = state_->streams.find(rank, stream);
    if (found->number < state_->ranks.size()) {
      throw DeviceError("the default stream cannot be captured");
    }
    if (found->capture != nullptr) {
      throw DeviceError(
          concat("stream ", found->number, " is in a capture already"));
    }
    found->capture = std::make_shared<DoubleGraph>(rank, state_->nextGraph++);
    found->beganCapture = true;
  });
}

std::shared_ptr<DoubleGraph> DoubleWorld::endCapture(
    int rank, Device::Stream stream) {
  return state_->call(rank, "endCapture", [&](auto&) {
    const auto found = state_->streams.find(rank, stream);
    if (!found->beganCapture) {
      throw DeviceError(
          concat("stream ", found->number, " has not begun a capture"));
    }
    const auto graph = found->capture;
    const auto tips = found->tips;
    state_->streams.endCapture(graph);
    graph->end(tips);
    return graph;
  });
}

void DoubleWorld::launch(
    const std::shared_ptr<DoubleGraph>& graph, Device::Stream stream) {
  const int rank = graph->rank();
  state_->call(rank, "launch", [&](auto&) {
    const auto found = state_->streams.find(rank, stream);
    if (found->capture != nullptr) {
      throw DeviceError("a graph within a capture is not modelled");
    }
    graph->launch(state_->streams, *found);
  });
}

}  // namespace automoe::testing
