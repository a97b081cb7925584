// SPDX-License-Identifier: Apache-2.0
#include "cuda_library/streams.hpp"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <random>
#include <utility>

namespace automoe::cuda_library {
namespace {

using std::chrono::microseconds;

constexpr auto kPoll = microseconds(20);

std::atomic<bool> broken = false;

/// Some work is late, at random.
class Delays {
 public:
  void now() {
    if (random_() % 4 == 0) {
      std::this_thread::sleep_for(microseconds(random_() % 300));
    }
  }

 private:
  std::minstd_rand random_{std::random_device{}()};
};

/// Whether it is done; what it throws breaks the device.
bool attempt(const Work& work) {
  try {
    return work();
  } catch (const std::exception& error) {
    failDevice(error.what());
    return true;
  }
}

/// Streams live until the end of the process: a thread of torch's may be late.
/// Whoever waits for one keeps it, as another thread may destroy it meanwhile.
struct Streams {
  std::mutex mutex;
  std::map<const Stream*, std::shared_ptr<Stream>> all;

  Stream& make(int priority) {
    auto made = std::make_shared<Stream>(priority);
    const std::lock_guard lock(mutex);
    return *(all[made.get()] = made);
  }
  std::shared_ptr<Stream> take(const Stream& stream) {
    const std::lock_guard lock(mutex);
    const auto found = all.extract(&stream);
    return found.empty() ? nullptr : found.mapped();
  }
  std::vector<std::shared_ptr<Stream>> list() {
    std::vector<std::shared_ptr<Stream>> listed;
    const std::lock_guard lock(mutex);
    for (const auto& [address, stream] : all) {
      listed.push_back(stream);
    }
    return listed;
  }
};

Streams& streams() {
  static auto* const all = new Streams;
  return *all;
}

}  // namespace

void failDevice(const std::string& text) {
  std::fprintf(stderr, "[cuda library] %s\n", text.c_str());
  broken = true;
}

cudaError_t deviceError() {
  return broken ? cudaErrorLaunchFailure : cudaSuccess;
}

namespace {
thread_local cudaError_t lastError = cudaSuccess;
}

cudaError_t refused(cudaError_t error) {
  return lastError = error;
}

cudaError_t takeLastError() {
  const cudaError_t last = std::exchange(lastError, cudaSuccess);
  return broken ? cudaErrorLaunchFailure : last;
}

Stream::Stream(int priority) : priority_(priority) {
  thread_ = std::thread([this] { work(); });
}

Stream::~Stream() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Graph::add(const Stream& stream, Step step) {
  const std::lock_guard lock(mutex);
  steps[&stream].push_back(std::move(step));
}

void Graph::run() {
  Replay replay(marks);
  std::vector<std::thread> threads;
  for (const auto& [stream, of] : steps) {
    threads.emplace_back([&replay, &all = of] {
      Delays delays;
      for (const Step& step : all) {
        delays.now();
        while (!attempt([&] { return step(replay); })) {
          std::this_thread::sleep_for(kPoll);
        }
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

void Stream::work() {
  Delays delays;
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stopping_ || !works_.empty(); });
    if (works_.empty()) {
      return;
    }
    // Only this thread takes from the front.
    Work& next = works_.front();
    lock.unlock();
    delays.now();
    const bool done = attempt(next);
    if (!done) {
      std::this_thread::sleep_for(kPoll);
    }
    lock.lock();
    if (done) {
      const Work finished = std::move(works_.front());
      works_.pop_front();
      changed_.notify_all();
    } else if (stopping_) {
      return;
    }
  }
}

void Stream::enqueue(Work work) {
  const std::lock_guard lock(mutex_);
  if (capture_ != nullptr) {
    capture_->add(*this, [work = std::move(work)](Replay&) { return work(); });
    return;
  }
  works_.push_back(std::move(work));
  changed_.notify_all();
}

void Stream::record(Event& event) {
  const auto mark = std::make_shared<Mark>();
  mark->graph = capture();
  if (mark->graph != nullptr) {
    mark->number = mark->graph->marks++;
    mark->graph->add(*this, [number = mark->number](Replay& replay) {
      return replay.happened[number] = true;
    });
  }
  {
    const std::lock_guard lock(event.mutex);
    event.latest = mark;
  }
  if (mark->graph == nullptr) {
    enqueue([mark] { return mark->done = true; });
  }
}

cudaError_t Stream::await(Event& event) {
  std::shared_ptr<Mark> mark;
  {
    const std::lock_guard lock(event.mutex);
    mark = event.latest;
  }
  const auto own = capture();
  if (mark == nullptr) {
    return cudaSuccess;
  }
  if (mark->graph != nullptr) {
    if (own != nullptr && own != mark->graph) {
      return cudaErrorStreamCaptureMerge;
    }
    {
      const std::lock_guard lock(mutex_);
      capture_ = mark->graph;  // joins it
    }
    mark->graph->add(*this, [number = mark->number](Replay& replay) {
      return replay.happened[number].load();
    });
    return cudaSuccess;
  }
  if (own != nullptr) {
    return cudaErrorStreamCaptureIsolation;
  }
  enqueue([mark] { return mark->done.load(); });
  return cudaSuccess;
}

bool Stream::idle() {
  const std::lock_guard lock(mutex_);
  return works_.empty();
}

void Stream::synchronize() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return works_.empty(); });
}

void Stream::beginCapture() {
  static std::atomic<unsigned long long> numbers = 0;
  const std::lock_guard lock(mutex_);
  capture_ = std::make_shared<Graph>();
  capture_->number = ++numbers;
}

std::shared_ptr<Graph> Stream::endCapture() {
  const auto graph = capture();
  for (const auto& each : streams().list()) {
    const std::lock_guard held(each->mutex_);
    if (each->capture_ == graph) {
      each->capture_ = nullptr;
    }
  }
  return graph;
}

std::shared_ptr<Graph> Stream::capture() {
  const std::lock_guard lock(mutex_);
  return capture_;
}

Stream& streamOf(cudaStream_t stream) {
  static Stream& standard = streams().make(0);
  const bool isStandard = stream == nullptr || stream == cudaStreamLegacy ||
                          stream == cudaStreamPerThread;
  return isStandard ? standard : *reinterpret_cast<Stream*>(stream);
}

void synchronizeAll() {
  for (const auto& stream : streams().list()) {
    stream->synchronize();
  }
}

}  // namespace automoe::cuda_library

using namespace automoe::cuda_library;

namespace {

Event& eventOf(cudaEvent_t event) {
  return *reinterpret_cast<Event*>(event);
}

cudaError_t make(cudaStream_t* stream, int priority) {
  *stream = reinterpret_cast<cudaStream_t>(&streams().make(priority));
  return deviceError();
}

}  // namespace

extern "C" {

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return make(stream, 0);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return make(stream, 0);
}

cudaError_t cudaStreamCreateWithPriority(
    cudaStream_t* stream, unsigned, int priority) {
  return make(stream, priority);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  // As CUDA does, at once: the work goes on.
  std::thread([gone = streams().take(streamOf(stream))]() mutable {
    gone.reset();
  }).detach();
  return deviceError();
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = streamOf(stream).priority();
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return streamOf(stream).idle() ? deviceError() : cudaErrorNotReady;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  streamOf(stream).synchronize();
  return deviceError();
}

cudaError_t cudaDeviceSynchronize() {
  synchronizeAll();
  return deviceError();
}

cudaError_t cudaStreamWaitEvent(
    cudaStream_t stream, cudaEvent_t event, unsigned) {
  const cudaError_t result = streamOf(stream).await(eventOf(event));
  return result == cudaSuccess ? deviceError() : result;
}

cudaError_t cudaLaunchHostFunc(
    cudaStream_t stream, cudaHostFn_t function, void* data) {
  streamOf(stream).enqueue([=] {
    function(data);
    return true;
  });
  return deviceError();
}

// ---- events ----

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return deviceError();
}

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return cudaEventCreateWithFlags(event, 0);
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete &eventOf(event);
  return deviceError();
}

cudaError_t cudaEventRecordWithFlags(
    cudaEvent_t event, cudaStream_t stream, unsigned) {
  streamOf(stream).record(eventOf(event));
  return deviceError();
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  Event& of = eventOf(event);
  const std::lock_guard lock(of.mutex);
  if (of.latest != nullptr && of.latest->graph != nullptr) {
    return cudaErrorCapturedEvent;
  }
  const bool done = of.latest == nullptr || of.latest->done;
  return done ? deviceError() : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  cudaError_t result = cudaErrorNotReady;
  while ((result = cudaEventQuery(event)) == cudaErrorNotReady) {
    std::this_thread::sleep_for(microseconds(20));
  }
  return result;
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 1;
  return cudaSuccess;
}

// ---- graphs ----

cudaError_t cudaStreamBeginCapture(
    cudaStream_t stream, enum cudaStreamCaptureMode) {
  streamOf(stream).beginCapture();
  return deviceError();
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  auto* made = new std::shared_ptr<Graph>(streamOf(stream).endCapture());
  *graph = reinterpret_cast<cudaGraph_t>(made);
  return deviceError();
}

cudaError_t cudaStreamIsCapturing(
    cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  *status = streamOf(stream).capture() == nullptr
                ? cudaStreamCaptureStatusNone
                : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream,
    enum cudaStreamCaptureStatus* status,
    unsigned long long* number,
    cudaGraph_t*,
    const cudaGraphNode_t**,
    const cudaGraphEdgeData**,
    size_t*) {
  const auto capture = streamOf(stream).capture();
  *status = capture == nullptr ? cudaStreamCaptureStatusNone
                               : cudaStreamCaptureStatusActive;
  if (number != nullptr && capture != nullptr) {
    *number = capture->number;
  }
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode*) {
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(
    cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  const auto& of = *reinterpret_cast<std::shared_ptr<Graph>*>(graph);
  *made = reinterpret_cast<cudaGraphExec_t>(new std::shared_ptr<Graph>(of));
  return deviceError();
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t made, cudaStream_t stream) {
  const auto& graph = *reinterpret_cast<std::shared_ptr<Graph>*>(made);
  streamOf(stream).enqueue([graph] {
    graph->run();
    return true;
  });
  return deviceError();
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<std::shared_ptr<Graph>*>(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t made) {
  delete reinterpret_cast<std::shared_ptr<Graph>*>(made);
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* count) {
  *count = 1;
  return cudaSuccess;
}
}
