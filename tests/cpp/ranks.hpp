// SPDX-License-Identifier: Apache-2.0
// Ranks as threads of one process, each with an engine of its own, and a
// store in memory. Nodes are pinned; "networks" are UCX over loopback.
#pragma once

#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "process_group/common/error.hpp"
#include "process_group/common/store.hpp"
#include "process_group/exchange/discovery.hpp"
#include "process_group/exchange/engine.hpp"

namespace automoe::testing {

class MemoryStore : public KeyValueStore {
 public:
  void set(const std::string& key, const std::string& value) override {
    const std::lock_guard lock(mutex_);
    values_[key] = value;
    changed_.notify_all();
  }
  std::vector<std::string> get(const std::vector<std::string>& keys) override {
    std::unique_lock lock(mutex_);
    std::vector<std::string> found;
    for (const auto& key : keys) {
      if (!changed_.wait_for(lock, std::chrono::seconds(30), [&] {
            return values_.contains(key);
          })) {
        throw TimeoutError("store: no " + key);
      }
      found.push_back(values_[key]);
    }
    return found;
  }
  int64_t add(const std::string& key, int64_t amount) override {
    const std::lock_guard lock(mutex_);
    return counters_[key] += amount;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;
  std::map<std::string, int64_t> counters_;
};

/// Runs body(rank) in one thread per rank and rethrows the first exception.
inline void runThreads(int size, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> errors(static_cast<size_t>(size));
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        body(rank);
      } catch (...) {
        errors[static_cast<size_t>(rank)] = std::current_exception();
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  for (const auto& error : errors) {
    if (error != nullptr) {
      std::rethrow_exception(error);
    }
  }
}

/// True once `done`; false when it has not come within half a minute.
inline bool eventually(const std::function<bool()>& done) {
  for (int i = 0; i < 30000 && !done(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return done();
}

struct Shape {
  std::vector<int> ranksPerNode;
  bool crossMemory = true;

  int size() const {
    int total = 0;
    for (int ranks : ranksPerNode) {
      total += ranks;
    }
    return total;
  }
  int nodeOf(int rank) const {
    int node = 0;
    while (rank >= ranksPerNode[static_cast<size_t>(node)]) {
      rank -= ranksPerNode[static_cast<size_t>(node)];
      node += 1;
    }
    return node;
  }
};

inline Config configFor(const Shape& shape, int rank) {
  Config config;
  config.node = "node" + std::to_string(shape.nodeOf(rank));
  config.interface = "lo";
  config.crossMemory =
      shape.crossMemory ? CrossMemory::kAlways : CrossMemory::kNever;
  config.nodeMemoryBytes = size_t{1} << 28;
  return config;
}

/// Engines that several launches of runThreads() use.
class Ranks {
 public:
  explicit Ranks(
      const Shape& shape,
      const std::function<void(Config&)>& adjust = [](Config&) {})
      : shape_(shape) {
    for (int rank = 0; rank < shape.size(); ++rank) {
      Config config = configFor(shape, rank);
      adjust(config);
      engines_.push_back(std::make_unique<Engine>(config));
    }
    groups_ = join("world");
  }
  ~Ranks() {
    try {
      runThreads(size(), [&](int rank) {
        engine(rank).shutdown(std::chrono::seconds(5));
      });
    } catch (const std::exception&) {
      // A test that failed has said why.
    }
  }
  std::vector<std::shared_ptr<Group>> join(const std::string& name) {
    std::vector<std::shared_ptr<Group>> groups(static_cast<size_t>(size()));
    MemoryStore store;
    runThreads(size(), [&](int rank) {
      groups[static_cast<size_t>(rank)] = joinGroup(
          engine(rank), store, rank, size(), name, std::chrono::seconds(30));
    });
    return groups;
  }
  int size() const { return shape_.size(); }
  Engine& engine(int rank) { return *engines_[static_cast<size_t>(rank)]; }
  Group& group(int rank) { return *groups_[static_cast<size_t>(rank)]; }
  void run(const std::function<void(int)>& body) { runThreads(size(), body); }

 private:
  Shape shape_;
  std::vector<std::unique_ptr<Engine>> engines_;
  std::vector<std::shared_ptr<Group>> groups_;
};

}  // namespace automoe::testing
