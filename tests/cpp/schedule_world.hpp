// SPDX-License-Identifier: Apache-2.0
// Runs the schedules of all ranks in one thread, in an order drawn at random
// among all that an engine may choose, and looks for what must not be.
//
// Messages as an engine moves them: a small one to a mate is copied when the
// send begins; a small one to another node leaves some time later; a large one
// is read from the sender's memory when it is delivered, and the sender hears
// of it later still. The memory of a send must not change before it is read.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/elementwise.hpp"
#include "process_group/common/error.hpp"
#include "process_group/exchange/schedule.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe::testing {

inline constexpr uint64_t kCopiedToMate = 8 << 10;
inline constexpr uint64_t kRidesToNode = 60 << 10;

class ScheduleWorld {
 public:
  ScheduleWorld(
      Topology topology,
      std::vector<Schedule> schedules,
      const kernels::Reduction& reduction,
      unsigned seed)
      : topology_(std::move(topology)),
        schedules_(std::move(schedules)),
        reduction_(reduction),
        mode_(static_cast<Mode>(seed % 4)),
        random_(seed),
        late_(static_cast<int>(seed / 4) % topology_.size()),
        ranks_(schedules_.size()),
        crossed_(schedules_.size() * schedules_.size(), 0) {
    for (int rank = 0; rank < topology_.size(); ++rank) {
      for (const Step& step : steps(rank)) {
        at(rank).waits.push_back(step.waitsFor);
      }
      if (mode_ != Mode::kLateRank || rank != late_) {
        pending_.push_back({Event::kStart, rank, 0, {}});
      }
    }
  }

  /// What went wrong; empty if all steps of all ranks have ended well.
  std::string run() {
    try {
      moveOn();
      if (at(late_).start == 0) {
        start(late_);
        moveOn();
      }
      checkEnd();
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "";
  }

  /// Bytes from one rank to another one, on another node.
  uint64_t crossed(int from, int to) const { return crossed_[index(from, to)]; }
  /// True if no rank was done before all had started.
  bool metInTheMiddle() const {
    uint64_t lastStart = 0;
    uint64_t firstEnd = clock_ + 1;
    for (const Rank& rank : ranks_) {
      lastStart = std::max(lastStart, rank.start);
      firstEnd = std::min(firstEnd, rank.end);
    }
    return lastStart <= firstEnd;
  }

 private:
  enum class Mode { kAnyOrder, kNewestFirst, kLateRank, kLateMessages };
  enum class Event { kStart, kBegin, kDepart, kDeliver, kRelease };
  using Name = std::tuple<int, int, uint32_t>;  // sender, receiver, slot

  struct Action {
    Event event;
    int rank;
    Schedule::Id step;
    Name message;
  };
  struct Rank {
    std::vector<uint32_t> waits;
    std::size_t ended = 0;
    uint64_t start = 0;
    uint64_t end = 0;
  };
  struct Message {
    bool sent = false;
    bool awaited = false;
    bool departed = false;  // a receive may have it
    bool delivered = false;
    Schedule::Id send = 0;
    Schedule::Id receive = 0;
    std::vector<std::byte> payload;
  };

  Rank& at(int rank) { return ranks_[static_cast<std::size_t>(rank)]; }
  const std::vector<Step>& steps(int rank) const {
    return schedules_[static_cast<std::size_t>(rank)].steps();
  }
  std::size_t index(int from, int to) const {
    return static_cast<std::size_t>(from) * schedules_.size() +
           static_cast<std::size_t>(to);
  }

  template <typename... Parts>
  [[noreturn]] static void fail(const Parts&... parts) {
    throw std::runtime_error(concat(parts...));
  }

  static std::string text(const Name& name) {
    const auto& [from, to, slot] = name;
    return concat("message ", slot, " from ", from, " to ", to);
  }

  void moveOn() {
    while (!pending_.empty()) {
      act(take());
    }
  }

  Action take() {
    std::size_t best = pending_.size() - 1;
    if (mode_ != Mode::kNewestFirst) {
      best = random_() % pending_.size();
    }
    // Of some, the one that moves a message least.
    for (int i = 0; mode_ == Mode::kLateMessages && i < 8; ++i) {
      const std::size_t other = random_() % pending_.size();
      if (pending_[other].event < pending_[best].event) {
        best = other;
      }
    }
    std::swap(pending_[best], pending_.back());
    Action action = pending_.back();
    pending_.pop_back();
    return action;
  }

  void act(const Action& action) {
    switch (action.event) {
      case Event::kStart:
        return start(action.rank);
      case Event::kBegin:
        return begin(action.rank, action.step);
      case Event::kDepart:
        return depart(action.message);
      case Event::kDeliver:
        return deliver(action.message);
      case Event::kRelease:
        return end(std::get<0>(action.message), action.step);
    }
  }

  void start(int rank) {
    at(rank).start = ++clock_;
    at(rank).end = clock_;
    for (Schedule::Id step = 0; step < steps(rank).size(); ++step) {
      if (at(rank).waits[step] == 0) {
        pending_.push_back({Event::kBegin, rank, step, {}});
      }
    }
  }

  void begin(int rank, Schedule::Id id) {
    const Step& step = steps(rank)[id];
    switch (step.kind) {
      case Step::Kind::kSend:
        return beginSend(rank, id);
      case Step::Kind::kReceive:
        return beginReceive(rank, id);
      case Step::Kind::kReduce:
        kernels::reduceElements(
            reduction_, step.to, step.inputs, step.bytes, step.last);
        return end(rank, id);
      case Step::Kind::kCopy:
        std::memcpy(step.to, step.from, step.bytes);
        return end(rank, id);
    }
  }

  void end(int rank, Schedule::Id id) {
    at(rank).ended += 1;
    at(rank).end = ++clock_;
    for (const Schedule::Id next : steps(rank)[id].then) {
      if (--at(rank).waits[next] == 0) {
        pending_.push_back({Event::kBegin, rank, next, {}});
      }
    }
  }

  bool areMates(const Name& name) const {
    return topology_.nodeOf(std::get<0>(name)) ==
           topology_.nodeOf(std::get<1>(name));
  }
  bool isLarge(const Name& name, uint64_t bytes) const {
    return bytes > (areMates(name) ? kCopiedToMate : kRidesToNode);
  }

  void beginSend(int rank, Schedule::Id id) {
    const Step& step = steps(rank)[id];
    const Name name(rank, step.peer, step.slot);
    Message& message = messages_[name];
    if (message.sent || step.peer == rank) {
      fail(text(name), " is sent twice, or to its sender");
    }
    message.sent = true;
    message.send = id;
    message.payload.assign(step.from, step.from + step.bytes);
    if (!areMates(name)) {
      crossed_[index(rank, step.peer)] += step.bytes;
    }
    if (isLarge(name, step.bytes)) {
      message.departed = true;
    } else if (areMates(name)) {
      message.departed = true;
      end(rank, id);
    } else {
      pending_.push_back({Event::kDepart, rank, id, name});
    }
    meet(name, message);
  }

  void beginReceive(int rank, Schedule::Id id) {
    const Step& step = steps(rank)[id];
    const Name name(step.peer, rank, step.slot);
    Message& message = messages_[name];
    if (message.awaited || step.peer == rank) {
      fail(text(name), " is received twice, or by its sender");
    }
    message.awaited = true;
    message.receive = id;
    meet(name, message);
  }

  void meet(const Name& name, const Message& message) {
    if (message.departed && message.awaited) {
      pending_.push_back({Event::kDeliver, 0, 0, name});
    }
  }

  const Step& sendOf(const Name& name, const Message& message) const {
    return steps(std::get<0>(name))[message.send];
  }

  // The bytes are read: they must be those that the send began with.
  void read(const Name& name, const Message& message) const {
    const Step& send = sendOf(name, message);
    if (send.bytes > 0 &&
        std::memcmp(send.from, message.payload.data(), send.bytes) != 0) {
      fail("the memory of ", text(name), " was written before it was read");
    }
  }

  void depart(const Name& name) {
    Message& message = messages_[name];
    read(name, message);
    message.departed = true;
    end(std::get<0>(name), message.send);
    meet(name, message);
  }

  void deliver(const Name& name) {
    Message& message = messages_[name];
    const int receiver = std::get<1>(name);
    const Step& receive = steps(receiver)[message.receive];
    const uint64_t bytes = message.payload.size();
    if (receive.bytes != bytes) {
      fail(text(name), " has ", bytes, " bytes for ", receive.bytes);
    }
    if (isLarge(name, bytes)) {
      read(name, message);
      pending_.push_back({Event::kRelease, 0, message.send, name});
    }
    if (bytes > 0) {
      std::memcpy(receive.to, message.payload.data(), bytes);
    }
    message.delivered = true;
    message.payload = {};
    end(receiver, message.receive);
  }

  void checkEnd() {
    for (int rank = 0; rank < topology_.size(); ++rank) {
      if (at(rank).ended != steps(rank).size()) {
        fail(
            "rank ",
            rank,
            " hangs: ",
            at(rank).ended,
            " of ",
            steps(rank).size(),
            " steps have ended");
      }
    }
    for (const auto& [name, message] : messages_) {
      if (!message.delivered) {
        fail(text(name), " is left over");
      }
    }
  }

  Topology topology_;
  std::vector<Schedule> schedules_;
  kernels::Reduction reduction_;
  Mode mode_;
  std::mt19937 random_;
  int late_;
  std::vector<Rank> ranks_;
  std::vector<uint64_t> crossed_;
  std::vector<Action> pending_;
  std::map<Name, Message> messages_;
  uint64_t clock_ = 0;
};

}  // namespace automoe::testing
