// SPDX-License-Identifier: Apache-2.0
// Streams, events and graphs of a CUDA library without a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace automoe::cuda_library {

class Stream;

/// What a stream does next; false: not yet.
using Work = std::function<bool()>;

/// One run of a graph.
struct Replay {
  explicit Replay(size_t marks) : happened(marks) {}
  std::vector<std::atomic<bool>> happened;  // by the numbers of the marks
};

/// The work of a capture: what each stream of it does.
struct Graph {
  using Step = std::function<bool(Replay&)>;

  void add(const Stream& stream, Step step);
  /// Each stream by a thread.
  void run();

  std::mutex mutex;
  std::map<const Stream*, std::vector<Step>> steps;  // guarded by mutex
  std::atomic<size_t> marks = 0;
  unsigned long long number = 0;
};

/// A record of an event.
struct Mark {
  std::atomic<bool> done = false;
  std::shared_ptr<Graph> graph;  // captured: it is never done
  size_t number = 0;             // in the graph
};

struct Event {
  std::mutex mutex;
  std::shared_ptr<Mark> latest;  // guarded by mutex
};

/// A thread does its work, in order, now and then late.
class Stream {
 public:
  explicit Stream(int priority);
  ~Stream();

  int priority() const { return priority_; }
  /// On the stream, or of the graph that it is captured into.
  void enqueue(Work work);
  void record(Event& event);
  cudaError_t await(Event& event);
  bool idle();
  void synchronize();

  void beginCapture();
  std::shared_ptr<Graph> endCapture();
  std::shared_ptr<Graph> capture();

 private:
  void work();

  const int priority_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> works_;
  std::shared_ptr<Graph> capture_;
  bool stopping_ = false;
  std::thread thread_;
};

/// That of the handle; of null and CUDA's other names, the default one.
Stream& streamOf(cudaStream_t stream);
/// What work has failed with, which all later calls return.
void failDevice(const std::string& text);
cudaError_t deviceError();
/// Notes what a call returns.
cudaError_t refused(cudaError_t error);
cudaError_t takeLastError();
/// Of the driver; of one that is not known, one that refuses.
void* driverFunction(const char* name);
/// Waits for all streams.
void synchronizeAll();

}  // namespace automoe::cuda_library
