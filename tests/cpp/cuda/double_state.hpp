// SPDX-License-Identifier: Apache-2.0
// What the devices and networks of one DoubleWorld share.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/double_device.hpp"
#include "cuda/double_graph.hpp"
#include "cuda/double_memory.hpp"
#include "cuda/double_streams.hpp"

namespace automoe::testing {

class DoubleFabric;

/// A record of an event; it lives as long as work waits for it.
struct DoubleMark {
  bool done = false;
  /// Of one that was recorded in a capture, which is never done.
  std::shared_ptr<DoubleGraph> capture = nullptr;
  DoubleGraph::Nodes tips = {};
};

struct DoubleEvent {
  int rank = 0;
  std::shared_ptr<DoubleMark> latest = nullptr;
};

/// Everything is guarded by the lock of the streams.
struct DoubleWorld::State {
  using Lock = DoubleStreams::Lock;

  struct Rank {
    Statistics statistics = {};
    std::set<uint64_t> failures = {};
    std::set<uint64_t> foreignFailures = {};
    bool capturing = false;
    std::string error = {};                        // all later calls throw it
    std::map<std::string, int> failingCalls = {};  // how often

    void failIfAsked(const std::string& name) {
      const auto found = failingCalls.find(name);
      if (found != failingCalls.end() && found->second > 0) {
        found->second -= 1;
        const std::string text = name + " fails, as failCalls() asked";
        if (name.starts_with("allocate")) {
          throw DeviceFullError(text);
        }
        throw DeviceError(text);
      }
    }
  };

  State(int size, unsigned seed);

  /// Calls body(lock); what it throws gets the rank and the call's name.
  template <typename Body>
  auto call(int rank, const char* name, Body&& body) {
    Lock lock(streams.mutex());
    const std::string& error = at(rank).error;
    try {
      if (!error.empty()) {
        throw DeviceError("work failed before: " + error);
      }
      at(rank).failIfAsked(name);
      return body(lock);
    } catch (const DeviceFullError& thrown) {
      throw DeviceFullError(
          concat("rank ", rank, ": ", name, ": ", thrown.what()));
    } catch (const DeviceError& thrown) {
      throw DeviceError(concat("rank ", rank, ": ", name, ": ", thrown.what()));
    }
  }

  /// The same for methods that do not throw: it goes to errors().
  template <typename Body>
  void quietCall(int rank, const char* name, Body&& body) noexcept {
    Lock lock(streams.mutex());
    try {
      body(lock);
    } catch (const DeviceError& thrown) {
      errors.push_back(concat("rank ", rank, ": ", name, ": ", thrown.what()));
    }
  }

  /// Puts what `make` returns, if that is something, on the stream.
  void enqueue(
      int rank,
      const char* name,
      Device::Stream stream,
      const std::function<std::optional<StreamItem>(DoubleStream&)>& make);
  /// Work of the rank failed.
  void fail(int rank, const std::string& text);
  Rank& at(int rank) { return ranks.at(static_cast<size_t>(rank)); }

  DoubleMemory memory;
  std::vector<Rank> ranks;
  std::map<uint64_t, DoubleEvent> events;
  uint64_t nextEvent = 1;
  uint64_t nextGraph = 1;
  std::vector<std::string> errors;
  // By ranks and name: the networks made so far.
  using FabricKey = std::pair<std::vector<int>, std::string>;
  std::map<FabricKey, std::vector<std::shared_ptr<DoubleFabric>>> fabrics;
  DoubleStreams streams;  // last: its thread uses all of the above
};

}  // namespace automoe::testing
