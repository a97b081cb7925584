// SPDX-License-Identifier: Apache-2.0
// A model of the exchange that holds what the posting rule is about: who has
// posted, which payloads ride, wait, are kept or delivered. It walks through
// every state that any interleaving can reach.
//
// Sources, each on a node of its own, send to two readers that share a node;
// reader 0 is the rail peer of all. An operation of one source holds
// Cluster::bytes for each reader. Messages travel in order on each link:
//   source -> reader 0   packets (sizes, and the payload if it rides), direct
//   source -> reader 1   direct payloads
//   reader -> source     "posted"
//   reader 0 -> reader 1 parts of packets that reader 0 relays
// (Records between the two readers, or between sources, carry no payload and
// are left out.) A rank's user thread calls in its own order; every rank's
// engine takes messages at any time. Each step is one call or one message.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "process_group/exchange/posting_rule.hpp"

namespace automoe::testing {

inline constexpr size_t kMaxSources = 3;
inline constexpr size_t kMaxOperations = 3;
inline constexpr size_t kReaders = 2;

enum class Rule {
  kPosting,         // as the code does it
  kEarlyRelease,    // a ride is matched by the first record of its node
  kBoundedLanding,  // payloads leave without a record into a bounded ring
};

/// A call of a user thread, perhaps not before all its earlier ones have ended.
struct Call {
  uint8_t operation;
  bool afterTheEarlier;
};
using Program = std::vector<Call>;

struct Cluster {
  Rule rule = Rule::kPosting;
  size_t sources = 2;
  size_t operations = 2;
  std::vector<Program> programs;       // of the sources, then the readers
  std::array<size_t, kReaders> bytes;  // of one operation, to each reader
  size_t largestRider = 0;
  size_t cap = 0;
  size_t landing = 0;  // room of the ring, kBoundedLanding only
};

struct Message {
  enum Kind : uint8_t { kPacket, kPart, kDirect, kPosted } kind;
  uint8_t operation;
  uint8_t source;  // or the reader that has posted
  bool rides;
};
using Link = std::vector<Message>;

/// One operation as a source sees it.
struct Sending {
  bool posted = false;
  bool rides = false;
  std::array<bool, kReaders> known = {};  // the reader's record is here
  std::array<bool, kReaders> waits = {};  // the payload has still to leave
  uint8_t unmatched = 0;                  // readers that its ride waits for
};

/// One operation as a reader sees it.
struct Receiving {
  bool posted = false;
  std::array<bool, kMaxSources> known = {};
  std::array<bool, kMaxSources> kept = {};      // arrived before the call
  std::array<uint8_t, kMaxSources> times = {};  // put into the output
};

struct State {
  std::array<uint8_t, kMaxSources + kReaders> position = {};
  std::vector<UnmatchedBudget> budgets;  // of each source for reader 0
  size_t landed = 0;                     // bytes in the bounded ring
  std::array<std::array<Sending, kMaxOperations>, kMaxSources> sending = {};
  std::array<std::array<Receiving, kMaxOperations>, kReaders> receiving = {};
  std::array<std::array<Link, kReaders>, kMaxSources> toReader;
  std::array<std::array<Link, kMaxSources>, kReaders> toSource;
  Link toMate;  // from reader 0 to reader 1
};

/// What the check has found.
struct Outcome {
  size_t states = 0;
  size_t ends = 0;
  size_t stuck = 0;      // states without a next one that are no end
  size_t capBroken = 0;  // states with too much unmatched payload
  size_t deliveredTwice = 0;
  size_t budgetLost = 0;     // ends with bytes that nobody gives back
  size_t waited = 0;         // payloads that did not ride, over all states
  size_t mostUnmatched = 0;  // bytes
};

class Model {
 public:
  explicit Model(const Cluster& cluster) : cluster_(cluster) {}

  Outcome explore() {
    State start;
    for (size_t i = 0; i < cluster_.sources; ++i) {
      start.budgets.emplace_back(cluster_.largestRider, cluster_.cap);
    }
    visit(start);
    while (!open_.empty()) {
      const State state = std::move(open_.front());
      open_.pop_front();
      inspect(state);
      const size_t next = expand(state);
      if (next == 0) {
        (complete(state) ? outcome_.ends : outcome_.stuck) += 1;
        for (const UnmatchedBudget& it : state.budgets) {
          outcome_.budgetLost += it.unmatched() == 0 ? 0 : 1;
        }
      }
    }
    return outcome_;
  }

 private:
  // ---- the search ----

  void visit(const State& state) {
    if (seen_.insert(key(state)).second) {
      outcome_.states += 1;
      open_.push_back(state);
    }
  }

  std::string key(const State& state) const {
    std::string text;
    const auto put = [&text](auto value) {
      text.push_back(static_cast<char>(value));
    };
    const auto putLink = [&](const Link& link) {
      put(link.size());
      for (const Message& it : link) {
        put(it.kind * 64 + it.operation * 16 + it.source * 2 + it.rides);
      }
    };
    for (const uint8_t it : state.position) {
      put(it);
    }
    put(state.landed);
    for (const UnmatchedBudget& it : state.budgets) {
      put(it.unmatched());
    }
    for (size_t op = 0; op < cluster_.operations; ++op) {
      for (size_t s = 0; s < cluster_.sources; ++s) {
        const Sending& it = state.sending[s][op];
        put(it.posted + 2 * it.rides + 4 * it.known[0] + 8 * it.known[1] +
            16 * it.waits[0] + 32 * it.waits[1] + 64 * it.unmatched);
      }
      for (size_t r = 0; r < kReaders; ++r) {
        const Receiving& it = state.receiving[r][op];
        put(it.posted);
        for (size_t s = 0; s < cluster_.sources; ++s) {
          put(it.known[s] + 2 * it.kept[s] + 4 * it.times[s]);
        }
      }
    }
    for (size_t s = 0; s < cluster_.sources; ++s) {
      for (size_t r = 0; r < kReaders; ++r) {
        putLink(state.toReader[s][r]);
        putLink(state.toSource[r][s]);
      }
    }
    putLink(state.toMate);
    return text;
  }

  /// Visits every state that one step leads to; their number.
  size_t expand(const State& state) {
    size_t steps = 0;
    const auto step = [&](const std::function<void(State&)>& change) {
      State next = state;
      change(next);
      visit(next);
      steps += 1;
    };
    for (size_t rank = 0; rank < cluster_.sources + kReaders; ++rank) {
      if (mayCall(state, rank)) {
        step([&](State& next) { call(next, rank); });
      }
    }
    for (size_t s = 0; s < cluster_.sources; ++s) {
      for (size_t r = 0; r < kReaders; ++r) {
        if (mayTake(state, s, r)) {
          step([&](State& next) { takeAtReader(next, s, r); });
        }
        if (!state.toSource[r][s].empty()) {
          step([&](State& next) { takeAtSource(next, s, r); });
        }
      }
    }
    if (!state.toMate.empty()) {
      step([&](State& next) { takeFromMate(next); });
    }
    return steps;
  }

  void inspect(const State& state) {
    for (size_t s = 0; s < cluster_.sources; ++s) {
      size_t unmatched = 0;
      for (size_t op = 0; op < cluster_.operations; ++op) {
        const Sending& sending = state.sending[s][op];
        for (size_t r = 0; r < kReaders; ++r) {
          const Receiving& receiving = state.receiving[r][op];
          unmatched +=
              sending.rides && !receiving.posted ? cluster_.bytes[r] : 0;
          outcome_.deliveredTwice += receiving.times[s] > 1 ? 1 : 0;
          outcome_.waited += sending.waits[r] ? 1 : 0;
        }
      }
      outcome_.mostUnmatched = std::max(outcome_.mostUnmatched, unmatched);
      outcome_.capBroken += unmatched > cluster_.cap ? 1 : 0;
    }
  }

  // ---- user threads ----

  size_t total() const { return cluster_.bytes[0] + cluster_.bytes[1]; }

  bool mayCall(const State& state, size_t rank) const {
    const Program& program = cluster_.programs[rank];
    const size_t position = state.position[rank];
    if (position == program.size()) {
      return false;
    }
    for (size_t i = 0; program[position].afterTheEarlier && i < position; ++i) {
      if (!done(state, rank, program[i].operation)) {
        return false;
      }
    }
    return true;
  }

  void call(State& state, size_t rank) const {
    const Call next = cluster_.programs[rank][state.position[rank]];
    state.position[rank] += 1;
    if (rank < cluster_.sources) {
      postAtSource(state, rank, next.operation);
    } else {
      postAtReader(state, rank - cluster_.sources, next.operation);
    }
  }

  /// Every record is here, every payload is in its output or has left.
  bool done(const State& state, size_t rank, size_t op) const {
    if (rank < cluster_.sources) {
      const Sending& it = state.sending[rank][op];
      return it.posted && it.known[0] && it.known[1] && !it.waits[0] &&
             !it.waits[1];
    }
    const Receiving& it = state.receiving[rank - cluster_.sources][op];
    bool all = it.posted;
    for (size_t s = 0; s < cluster_.sources; ++s) {
      all = all && it.known[s] && it.times[s] == 1;
    }
    return all;
  }

  bool complete(const State& state) const {
    for (size_t rank = 0; rank < cluster_.sources + kReaders; ++rank) {
      for (size_t op = 0; op < cluster_.operations; ++op) {
        if (!done(state, rank, op)) {
          return false;
        }
      }
    }
    return true;
  }

  // ---- sources ----

  void postAtSource(State& state, size_t s, uint8_t op) const {
    Sending& sending = state.sending[s][op];
    sending.posted = true;
    if (cluster_.rule == Rule::kBoundedLanding) {
      sending.rides = true;  // there is no record to wait for
    } else if (state.budgets[s].tryRide(total())) {
      sending.rides = true;
      sending.unmatched =
          static_cast<uint8_t>(!sending.known[0] + !sending.known[1]);
      if (sending.unmatched == 0) {
        state.budgets[s].matched(total());
      }
    } else {
      sending.waits = {true, true};
    }
    state.toReader[s][0].push_back(
        {Message::kPacket, op, static_cast<uint8_t>(s), sending.rides});
    for (size_t r = 0; r < kReaders; ++r) {
      if (sending.known[r]) {
        sendMatched(state, s, r, op);
      }
    }
  }

  void takeAtSource(State& state, size_t s, size_t r) const {
    const Message message = state.toSource[r][s].front();
    state.toSource[r][s].erase(state.toSource[r][s].begin());
    Sending& sending = state.sending[s][message.operation];
    sending.known[r] = true;
    if (!sending.posted) {
      return;
    }
    if (sending.unmatched > 0) {
      sending.unmatched =
          cluster_.rule == Rule::kEarlyRelease ? 0 : sending.unmatched - 1;
      if (sending.unmatched == 0) {
        state.budgets[s].matched(total());
      }
    }
    sendMatched(state, s, r, message.operation);
  }

  void sendMatched(State& state, size_t s, size_t r, uint8_t op) const {
    Sending& sending = state.sending[s][op];
    if (sending.waits[r]) {
      sending.waits[r] = false;
      state.toReader[s][r].push_back(
          {Message::kDirect, op, static_cast<uint8_t>(s), true});
    }
  }

  // ---- readers ----

  void postAtReader(State& state, size_t r, uint8_t op) const {
    Receiving& receiving = state.receiving[r][op];
    receiving.posted = true;
    const Message record = {
        Message::kPosted, op, static_cast<uint8_t>(r), false};
    for (size_t s = 0; s < cluster_.sources; ++s) {
      state.toSource[r][s].push_back(record);
      if (receiving.kept[s]) {
        receiving.kept[s] = false;
        deliver(state, s, r, op);
      }
    }
  }

  /// Messages of a source for a reader can be taken at any time, but for the
  /// bounded ring, which may have no room for the next one.
  bool mayTake(const State& state, size_t s, size_t r) const {
    const Link& link = state.toReader[s][r];
    return !link.empty() && (cluster_.rule != Rule::kBoundedLanding ||
                             state.landed + total() <= cluster_.landing);
  }

  void takeAtReader(State& state, size_t s, size_t r) const {
    const Message message = state.toReader[s][r].front();
    state.toReader[s][r].erase(state.toReader[s][r].begin());
    if (message.kind == Message::kDirect) {
      arrive(state, s, r, message.operation);
      return;
    }
    if (cluster_.rule == Rule::kBoundedLanding) {
      state.landed += total();
    }
    state.toMate.push_back(
        {Message::kPart, message.operation, message.source, message.rides});
    takeRecord(state, s, 0, message);
  }

  void takeFromMate(State& state) const {
    const Message message = state.toMate.front();
    state.toMate.erase(state.toMate.begin());
    takeRecord(state, message.source, 1, message);
  }

  void takeRecord(
      State& state, size_t s, size_t r, const Message& message) const {
    state.receiving[r][message.operation].known[s] = true;
    if (message.rides) {
      arrive(state, s, r, message.operation);
    }
  }

  void arrive(State& state, size_t s, size_t r, size_t op) const {
    Receiving& receiving = state.receiving[r][op];
    if (receiving.posted) {
      deliver(state, s, r, op);
    } else {
      receiving.kept[s] = true;
    }
  }

  void deliver(State& state, size_t s, size_t r, size_t op) const {
    state.receiving[r][op].times[s] += 1;
    if (cluster_.rule == Rule::kBoundedLanding) {
      state.landed -= cluster_.bytes[r];
    }
  }

  const Cluster& cluster_;
  std::deque<State> open_;
  std::unordered_set<std::string> seen_;
  Outcome outcome_;
};

}  // namespace automoe::testing
