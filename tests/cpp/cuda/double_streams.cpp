// SPDX-License-Identifier: Apache-2.0
// How the streams of the test double are worked off.
#include "cuda/double_streams.hpp"

#include <algorithm>
#include <exception>
#include <utility>

namespace automoe::testing {

namespace {

// Items wait this long for more to come, so that the choice is among many.
constexpr auto kLag = std::chrono::microseconds(200);
constexpr auto kLongestLag = std::chrono::milliseconds(5);
constexpr auto kLook = std::chrono::milliseconds(1);
constexpr auto kIdle = std::chrono::milliseconds(1000);
// One item or so many wait at most, by the seed.
constexpr size_t kMostQueued[] = {1, 4, 32, 256};

}  // namespace

DoubleStreams::DoubleStreams(int ranks, unsigned seed)
    : stalled_(static_cast<size_t>(ranks), false),
      random_(seed),
      choice_(
          static_cast<Choice>(seed % static_cast<unsigned>(Choice::kCount))),
      salt_(static_cast<unsigned>(random_())),
      mostQueued_(kMostQueued[random_() % std::size(kMostQueued)]) {
  for (int rank = 0; rank < ranks; ++rank) {
    make(rank);  // the default streams have the numbers of their ranks
  }
  thread_ = std::thread([this] { work(); });
}

DoubleStreams::~DoubleStreams() {
  stop();
}

void DoubleStreams::stop() {
  {
    const Lock lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) {
    thread_.join();
  }
  std::vector<std::deque<StreamItem>> dropped;  // without the lock
  const Lock lock(mutex_);
  for (const auto& [number, stream] : streams_) {
    dropped.push_back(std::exchange(stream->items, {}));
  }
}

std::shared_ptr<DoubleStream> DoubleStreams::add(int rank) {
  auto stream = std::make_shared<DoubleStream>();
  stream->rank = rank;
  stream->number = nextNumber_++;
  streams_[stream->number] = stream;
  return stream;
}

Device::Stream DoubleStreams::make(int rank) {
  return reinterpret_cast<Device::Stream>(add(rank)->number);
}

std::shared_ptr<DoubleStream> DoubleStreams::makeForNode(
    int rank, std::function<bool()> gate) {
  auto stream = add(rank);
  stream->destroyed = true;
  stream->gate = std::move(gate);
  return stream;
}

std::set<std::shared_ptr<DoubleGraph>> DoubleStreams::captures(int rank) const {
  std::set<std::shared_ptr<DoubleGraph>> found;
  for (const auto& [number, stream] : streams_) {
    if (stream->rank == rank && stream->capture != nullptr) {
      found.insert(stream->capture);
    }
  }
  return found;
}

void DoubleStreams::endCapture(const std::shared_ptr<DoubleGraph>& graph) {
  for (const auto& [number, stream] : streams_) {
    if (stream->capture == graph) {
      stream->capture = nullptr;
      stream->beganCapture = false;
      stream->tips.clear();
    }
  }
}

void DoubleStreams::destroy(int rank, Device::Stream stream) {
  const auto found = find(rank, stream);
  if (found->number < stalled_.size()) {
    throw DeviceError("destroyStream: the default stream stays");
  }
  if (found->capture != nullptr) {
    throw DeviceError("destroyStream: the stream is in a capture");
  }
  found->destroyed = true;
  if (found->items.empty()) {
    streams_.erase(found->number);
  }
}

std::shared_ptr<DoubleStream> DoubleStreams::find(
    int rank, Device::Stream stream) const {
  const auto number = stream == nullptr ? static_cast<uint64_t>(rank)
                                        : reinterpret_cast<uint64_t>(stream);
  const auto found = streams_.find(number);
  if (found == streams_.end() || found->second->destroyed) {
    throw DeviceError(
        concat("stream ", number, " does not exist (destroyed before?)"));
  }
  if (found->second->rank != rank) {
    throw DeviceError(
        concat("stream ", number, " is one of rank ", found->second->rank));
  }
  return found->second;
}

std::vector<std::string> DoubleStreams::leaks(int rank) const {
  std::vector<std::string> found;
  for (const auto& [number, stream] : streams_) {
    const bool made = number >= stalled_.size() && !stream->destroyed;
    if (stream->rank == rank && made) {
      found.push_back(concat("stream ", number));
    }
  }
  return found;
}

void DoubleStreams::enqueue(DoubleStream& stream, StreamItem item) {
  if (queued_ == 0) {
    lagFrom_ = Clock::now();
  }
  stream.items.push_back(std::move(item));
  stream.enqueued += 1;
  queued_ += 1;
  touch();
}

void DoubleStreams::touch() {
  hostMoved_ = worldMoved_ = Clock::now();
  wake_.notify_all();
}

void DoubleStreams::stall(int rank, bool stalled) {
  stalled_[static_cast<size_t>(rank)] = stalled;
  touch();
}

bool DoubleStreams::empty(int rank) const {
  return std::all_of(streams_.begin(), streams_.end(), [&](const auto& entry) {
    return entry.second->rank != rank || entry.second->items.empty();
  });
}

void DoubleStreams::wait(
    Lock& lock, const std::string& what, std::function<bool()> done) {
  if (std::this_thread::get_id() == thread_.get_id()) {
    throw DeviceError(what + " blocks the host, and was called by work");
  }
  const auto waiter = waiters_.insert(waiters_.end(), done);
  wake_.notify_all();
  auto since = Clock::now();
  while (!done()) {
    since = std::max(since, worldMoved_);
    moved_.wait_until(lock, since + patience_);
    if (Clock::now() < since + patience_ || done()) {
      continue;
    }
    since = std::max(Clock::now(), worldMoved_);
    const std::string text = deadlock();
    if (!text.empty()) {
      waiters_.erase(waiter);
      throw DeviceError(concat(what, ": no stream can move: ", text));
    }
  }
  waiters_.erase(waiter);
  hostMoved_ = Clock::now();
}

void DoubleStreams::settle(Lock& lock) {
  wait(lock, "settle", [this] { return readyStreams().empty(); });
}

bool DoubleStreams::ready(const DoubleStream& stream) const {
  return !stream.items.empty() && open(stream) &&
         (!stream.items.front().ready || stream.items.front().ready());
}

DoubleStreams::Streams DoubleStreams::readyStreams() const {
  Streams found;
  for (const auto& [number, stream] : streams_) {
    if (ready(*stream)) {
      found.push_back(stream);
    }
  }
  return found;
}

std::string DoubleStreams::deadlock() const {
  std::string text;
  for (const auto& [number, stream] : streams_) {
    if (ready(*stream)) {
      return "";
    }
    const bool gated = stream->gate && !stream->gate();  // for another one here
    if (!stream->items.empty() && !gated) {
      text += concat(
          text.empty() ? "" : "; ",
          "rank ",
          stream->rank,
          ", stream ",
          number,
          stalled(stream->rank) ? " (stalled): " : ": ",
          stream->items.front().what(),
          ", then ",
          stream->items.size() - 1,
          " more");
    }
  }
  return text;
}

bool DoubleStreams::late(const DoubleStream& stream) const {
  switch (choice_) {
    case Choice::kLateRank:
      return static_cast<size_t>(stream.rank) == salt_ % stalled_.size();
    case Choice::kLateStreams:
      return ((salt_ >> (stream.number % 31)) & 1) != 0;
    default:
      return false;
  }
}

std::shared_ptr<DoubleStream> DoubleStreams::choose(Streams streams) {
  Streams early;
  for (const auto& stream : streams) {
    if (choice_ == Choice::kSameStream && stream->number == last_) {
      return stream;
    }
    if (!late(*stream)) {
      early.push_back(stream);
    }
  }
  if (!early.empty()) {
    streams = early;
  }
  switch (choice_) {
    case Choice::kNewestStream:
      return streams.back();
    case Choice::kOldestStream:
      return streams.front();
    default:
      return streams[draw(streams.size())];
  }
}

DoubleStreams::Clock::time_point DoubleStreams::startsAt() const {
  const bool waitedFor =
      std::any_of(waiters_.begin(), waiters_.end(), [](const auto& done) {
        return !done();
      });
  if (waitedFor || queued_ >= mostQueued_) {
    return Clock::time_point::min();
  }
  // A host that has what it waited for goes on before other work does.
  const auto moved = waiters_.empty() ? hostMoved_ : worldMoved_;
  return std::min(moved + kLag, lagFrom_ + kLongestLag);
}

void DoubleStreams::work() {
  Lock lock(mutex_);
  while (!stopping_) {
    const Streams streams = readyStreams();
    if (streams.empty()) {
      moved_.notify_all();
      // The host may set a flag, of which nobody is told.
      wake_.wait_for(lock, queued_ > 0 ? kLook : kIdle);
    } else if (const auto start = startsAt(); start > Clock::now()) {
      wake_.wait_until(lock, start);
    } else {
      runOne(lock, choose(streams));
    }
  }
}

void DoubleStreams::runOne(
    Lock& lock, const std::shared_ptr<DoubleStream>& stream) {
  last_ = stream->number;
  StreamItem& item = stream->items.front();  // others only append
  bool done = true;
  std::string error;
  if (!item.locked) {
    lock.unlock();
  }
  try {
    done = item.step();
  } catch (const std::exception& thrown) {
    error = thrown.what();
  }
  if (!item.locked) {
    lock.lock();
  }
  worldMoved_ = lagFrom_ = Clock::now();
  if (!error.empty()) {
    onError_(stream->rank, concat(item.what(), ": ", error));
  }
  if (!done) {
    return;
  }
  StreamItem finished = std::move(item);
  stream->items.pop_front();
  stream->done += 1;
  queued_ -= 1;
  onDone_(stream->rank);
  if (stream->destroyed && stream->items.empty()) {
    streams_.erase(stream->number);
  }
  moved_.notify_all();
  // What a kernel holds may call the device when it goes.
  lock.unlock();
  finished = {};
  lock.lock();
}

}  // namespace automoe::testing
