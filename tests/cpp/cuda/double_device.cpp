// SPDX-License-Identifier: Apache-2.0
// The double of Device.
#include "cuda/double_device.hpp"

#include <atomic>
#include <cstring>
#include <optional>
#include <utility>

#include "cuda/double_state.hpp"

namespace automoe::testing {

namespace {

using Place = DoubleMemory::Place;

// What work may touch; copies of it outlive the device.
struct Access {
  DoubleWorld::State* state;
  int rank;

  std::string describe(const void* memory) const {
    return state->memory.describe(static_cast<const std::byte*>(memory));
  }
  // Throws unless device work of the rank may use the bytes.
  void check(const void* memory, size_t bytes) const {
    const auto* begin = static_cast<const std::byte*>(memory);
    if (state->memory.use(rank, begin, bytes) == Place::kPageable) {
      throw DeviceError(
          describe(memory) +
          " is not memory of the device: use allocate() or "
          "allocateHost(), or adopt() it in the test");
    }
  }
  void checkFlag(const uint32_t* flag) const {
    if (reinterpret_cast<uintptr_t>(flag) % sizeof(*flag) != 0) {
      throw DeviceError(describe(flag) + " is not aligned to 4 bytes");
    }
    check(flag, sizeof(*flag));
  }
};

class DoubleDevice final : public Device {
 public:
  DoubleDevice(DoubleWorld::State& state, int rank)
      : state_(state), rank_(rank), access_{&state, rank} {}

  std::string name() const override {
    return concat("test double (", rank_, ")");
  }
  std::byte* allocate(size_t bytes) override {
    return allocateOrMakeRoom([&] {
      return state_.call(rank_, "allocate", [&](auto&) {
        return state_.memory.allocate(rank_, bytes, Place::kDevice);
      });
    });
  }
  std::byte* allocateShared(size_t bytes) override {
    return allocateOrMakeRoom([&] {
      return state_.call(rank_, "allocateShared", [&](auto&) {
        return state_.memory.allocate(rank_, bytes, Place::kDevice);
      });
    });
  }
  void free(std::byte* memory) noexcept override;
  std::byte* allocateHost(size_t bytes) override {
    return state_.call(rank_, "allocateHost", [&](auto&) {
      return state_.memory.allocate(rank_, bytes, Place::kPageLocked);
    });
  }
  void freeHost(std::byte* memory) noexcept override;
  std::byte* mapHost(std::byte* pages, size_t bytes) override {
    return state_.call(rank_, "mapHost", [&](auto&) {
      state_.memory.map(rank_, pages, bytes);
      return pages;
    });
  }
  void unmapHost(std::byte* pages) noexcept override {
    state_.quietCall(
        rank_, "unmapHost", [&](auto&) { state_.memory.unmap(rank_, pages); });
  }
  Handle exportMemory(std::byte* memory) override {
    return state_.call(rank_, "exportMemory", [&](auto&) {
      return state_.memory.exportMemory(rank_, memory);
    });
  }
  std::byte* openMemory(const Handle& handle) override {
    return state_.call(rank_, "openMemory", [&](auto&) {
      return state_.memory.open(rank_, handle);
    });
  }
  void closeMemory(std::byte* memory) noexcept override {
    state_.quietCall(rank_, "closeMemory", [&](auto&) {
      state_.memory.close(rank_, memory);
    });
  }

  Stream makeStream() override {
    return state_.call(
        rank_, "makeStream", [&](auto&) { return state_.streams.make(rank_); });
  }
  void destroyStream(Stream stream) noexcept override {
    state_.quietCall(rank_, "destroyStream", [&](auto&) {
      state_.streams.destroy(rank_, stream);
    });
  }
  Event makeEvent() override;
  void destroyEvent(Event event) noexcept override;
  void record(Event event, Stream stream) override;
  void await(Stream stream, Event event) override;
  bool happened(Event event) override;
  bool isCapturing(Stream stream) override {
    return state_.call(rank_, "isCapturing", [&](auto&) {
      return state_.at(rank_).capturing ||
             state_.streams.find(rank_, stream)->capture != nullptr;
    });
  }
  void synchronize(Stream stream) override;

  void copy(Stream stream, std::byte* to, const std::byte* from, size_t bytes)
      override;
  void clear(Stream stream, std::byte* to, size_t bytes) override;
  void run(Stream stream, std::function<void(kernels::DeviceStream)> launch)
      override;
  void setFlags(
      Stream stream, std::span<uint32_t* const> flags, uint32_t value) override;
  void awaitFlags(
      Stream stream,
      std::span<uint32_t* const> flags,
      uint32_t value,
      uint32_t next) override;

 private:
  DoubleEvent& find(Event event);
  void set(Stream stream, uint32_t* flag, uint32_t value);
  void await(Stream stream, uint32_t* flag, uint32_t value, uint32_t next);
  void join(DoubleStream& stream, const DoubleMark& mark);
  void refuseInCapture();
  void waitForWork(DoubleStreams::Lock& lock, const std::string& what);

  DoubleWorld::State& state_;
  int rank_;
  Access access_;
};

void DoubleDevice::free(std::byte* memory) noexcept {
  if (memory == nullptr) {
    return;
  }
  state_.quietCall(rank_, "free", [&](auto& lock) {
    state_.at(rank_).statistics.freed += 1;
    refuseInCapture();
    waitForWork(lock, access_.describe(memory));
    const auto wrong = state_.memory.free(rank_, memory, Place::kDevice);
    if (!wrong.empty()) {
      throw DeviceError(wrong);
    }
  });
}

void DoubleDevice::freeHost(std::byte* memory) noexcept {
  if (memory == nullptr) {
    return;
  }
  state_.quietCall(rank_, "freeHost", [&](auto& lock) {
    refuseInCapture();
    waitForWork(lock, access_.describe(memory));
    state_.memory.free(rank_, memory, Place::kPageLocked);
  });
}

// It waits for the device, and what is captured is never done.
void DoubleDevice::refuseInCapture() {
  const auto captures = state_.streams.captures(rank_);
  for (const auto& capture : captures) {
    capture->invalidate("memory was freed during it");
  }
  if (!captures.empty()) {
    throw DeviceError("refused while a stream of the rank is in a capture");
  }
}

// Goes on after the world stood still for long: the memory is freed anyway,
// and the error says so.
void DoubleDevice::waitForWork(
    DoubleStreams::Lock& lock, const std::string& what) {
  try {
    state_.streams.wait(
        lock, what, [&] { return state_.streams.empty(rank_); });
  } catch (const DeviceError& error) {
    state_.errors.push_back(
        concat("rank ", rank_, ": free does not wait longer: ", error.what()));
  }
}

Device::Event DoubleDevice::makeEvent() {
  return state_.call(rank_, "makeEvent", [&](auto&) {
    const uint64_t number = state_.nextEvent++;
    state_.events[number] = {rank_};
    return reinterpret_cast<Event>(number);
  });
}

void DoubleDevice::destroyEvent(Event event) noexcept {
  state_.quietCall(rank_, "destroyEvent", [&](auto&) {
    find(event);
    state_.events.erase(reinterpret_cast<uint64_t>(event));
  });
}

DoubleEvent& DoubleDevice::find(Event event) {
  const auto number = reinterpret_cast<uint64_t>(event);
  const auto found = state_.events.find(number);
  if (found == state_.events.end()) {
    throw DeviceError(
        concat("event ", number, " does not exist (destroyed before?)"));
  }
  if (found->second.rank != rank_) {
    throw DeviceError(
        concat("event ", number, " is one of rank ", found->second.rank));
  }
  return found->second;
}

void DoubleDevice::record(Event event, Stream stream) {
  const auto make = [&](DoubleStream& found) -> std::optional<StreamItem> {
    const auto mark = std::make_shared<DoubleMark>();
    if (found.capture != nullptr) {
      found.capture->check();
      *mark = {.capture = found.capture, .tips = found.tips};
      find(event).latest = mark;
      return std::nullopt;
    }
    find(event).latest = mark;
    return StreamItem{
        [number = reinterpret_cast<uint64_t>(event)] {
          return concat("record event ", number);
        },
        {},
        [mark] { return mark->done = true; }};
  };
  state_.enqueue(rank_, "record", stream, make);
}

void DoubleDevice::await(Stream stream, Event event) {
  state_.enqueue(
      rank_, "await", stream, [&](auto& found) -> std::optional<StreamItem> {
        const auto mark = find(event).latest;
        if (found.capture != nullptr) {
          found.capture->check();
        }
        if (mark == nullptr) {
          return std::nullopt;
        }
        if (found.capture != nullptr || mark->capture != nullptr) {
          join(found, *mark);
          return std::nullopt;
        }
        return StreamItem{
            [number = reinterpret_cast<uint64_t>(event)] {
              return concat("await event ", number);
            },
            [mark] { return mark->done; }};
      });
}

// In a capture there is no item for it: what the stream gets next comes after.
void DoubleDevice::join(DoubleStream& stream, const DoubleMark& mark) {
  if (mark.capture == nullptr) {
    const char* text = "it awaits an event that was recorded outside of it";
    stream.capture->invalidate(text);
    stream.capture->check();
  }
  mark.capture->check();
  if (mark.capture->ended()) {
    throw DeviceError("the event was recorded in a capture that has ended");
  }
  if (stream.capture != nullptr && stream.capture != mark.capture) {
    stream.capture->invalidate("it awaits an event of another capture");
    mark.capture->invalidate("another capture awaits an event of it");
    stream.capture->check();
  }
  stream.capture = mark.capture;
  stream.tips.insert(mark.tips.begin(), mark.tips.end());
}

bool DoubleDevice::happened(Event event) {
  return state_.call(rank_, "happened", [&](auto&) {
    const auto& latest = find(event).latest;
    if (latest != nullptr && latest->capture != nullptr) {
      latest->capture->invalidate("an event of it was queried");
      throw DeviceError(
          "the event was recorded in a capture: it cannot happen");
    }
    return latest == nullptr || latest->done;
  });
}

void DoubleDevice::synchronize(Stream stream) {
  state_.call(rank_, "synchronize", [&](auto& lock) {
    state_.at(rank_).statistics.synchronized += 1;
    const auto found = state_.streams.find(rank_, stream);
    if (found->capture != nullptr) {
      found->capture->invalidate("a stream in it was synchronized");
      found->capture->check();
    }
    const uint64_t enqueued = found->enqueued;
    state_.streams.wait(lock, concat("stream ", found->number), [&] {
      return found->done >= enqueued;
    });
    if (!state_.at(rank_).error.empty()) {
      throw DeviceError(state_.at(rank_).error);
    }
  });
}

void DoubleDevice::copy(
    Stream stream, std::byte* to, const std::byte* from, size_t bytes) {
  const Access access = access_;  // for the item, which may outlive this
  state_.enqueue(
      rank_, "copy", stream, [&](auto& found) -> std::optional<StreamItem> {
        if (bytes == 0) {
          return std::nullopt;
        }
        access.check(to, bytes);
        auto staged = std::make_shared<std::vector<std::byte>>();
        if (state_.memory.use(rank_, from, bytes) == Place::kPageable) {
          if (found.capture != nullptr) {
            throw DeviceError(
                access.describe(from) +
                " is read when the graph runs: use allocateHost()");
          }
          state_.at(rank_).statistics.pageableCopies += 1;
          staged->assign(from, from + bytes);
        }
        return StreamItem{
            [=] {
              return concat(
                  "copy ",
                  bytes,
                  " bytes: ",
                  access.describe(from),
                  " to ",
                  access.describe(to));
            },
            {},
            [=] {
              const bool direct = staged->empty();
              access.check(to, bytes);
              if (direct) {
                access.check(from, bytes);
              }
              std::memmove(to, direct ? from : staged->data(), bytes);
              access.state->at(access.rank).statistics.copiedBytes += bytes;
              return true;
            }};
      });
}

void DoubleDevice::clear(Stream stream, std::byte* to, size_t bytes) {
  const Access access = access_;  // for the item, which may outlive this
  state_.enqueue(
      rank_, "clear", stream, [&](auto&) -> std::optional<StreamItem> {
        if (bytes == 0) {
          return std::nullopt;
        }
        access.check(to, bytes);
        return StreamItem{
            [=] {
              return concat("clear ", bytes, " bytes: ", access.describe(to));
            },
            {},
            [=] {
              access.check(to, bytes);
              std::memset(to, 0, bytes);
              return true;
            }};
      });
}

void DoubleDevice::run(
    Stream stream, std::function<void(kernels::DeviceStream)> launch) {
  state_.enqueue(rank_, "run", stream, [&](auto&) {
    if (!launch) {
      throw DeviceError("launch is empty: pass a function");
    }
    return StreamItem{
        [] { return std::string("run a kernel"); },
        {},
        [launch = std::move(launch)] {
          launch(nullptr);
          return true;
        },
        false};
  });
}

void DoubleDevice::setFlags(
    Stream stream, std::span<uint32_t* const> flags, uint32_t value) {
  for (uint32_t* flag : flags) {
    set(stream, flag, value);
  }
}

void DoubleDevice::awaitFlags(
    Stream stream,
    std::span<uint32_t* const> flags,
    uint32_t value,
    uint32_t next) {
  for (uint32_t* flag : flags) {
    await(stream, flag, value, next);
  }
}

void DoubleDevice::set(Stream stream, uint32_t* flag, uint32_t value) {
  const Access access = access_;  // for the item, which may outlive this
  state_.enqueue(rank_, "setFlag", stream, [&](auto&) {
    access.checkFlag(flag);
    return StreamItem{
        [=] {
          return concat("set flag ", access.describe(flag), " to ", value);
        },
        {},
        [=] {
          access.checkFlag(flag);
          std::atomic_ref(*flag).store(value, std::memory_order_release);
          return true;
        }};
  });
}

void DoubleDevice::await(
    Stream stream, uint32_t* flag, uint32_t value, uint32_t next) {
  const Access access = access_;  // for the item, which may outlive this
  state_.enqueue(rank_, "awaitFlag", stream, [&](auto&) {
    access.checkFlag(flag);
    const auto load = [=]() -> std::optional<uint32_t> {
      try {
        access.checkFlag(flag);
      } catch (const DeviceError&) {
        return std::nullopt;  // to be thrown when it runs
      }
      return std::atomic_ref(*flag).load(std::memory_order_acquire);
    };
    return StreamItem{
        [=] {
          const auto now = load();
          return concat(
              "await flag ",
              access.describe(flag),
              " to be ",
              value,
              ", it is ",
              now ? std::to_string(*now) : "gone");
        },
        [=] { return load().value_or(value) == value; },
        [=] {
          access.checkFlag(flag);
          if (next != value) {
            std::atomic_ref(*flag).store(next, std::memory_order_release);
          }
          return true;
        }};
  });
}

}  // namespace

std::unique_ptr<Device> DoubleWorld::makeDevice(int rank) {
  AUTOMOE_CHECK(
      rank >= 0 && static_cast<size_t>(rank) < state_->ranks.size(),
      "no rank ",
      rank);
  return std::make_unique<DoubleDevice>(*state_, rank);
}

}  // namespace automoe::testing
