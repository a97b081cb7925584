// SPDX-License-Identifier: Apache-2.0
// A collective that follows a schedule.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "kernels/elementwise.hpp"
#include "process_group/exchange/collective.hpp"
#include "process_group/exchange/messages.hpp"
#include "process_group/exchange/schedule.hpp"

namespace automoe {

/// The memory that the schedule names must stay until
/// OperationCallbacks::released.
struct ScheduledArguments {
  Schedule schedule;
  MessageDescription description;  // says which collective it is
  kernels::Reduction reduction;    // where the schedule reduces
};

/// Runs the steps of its schedule as they become possible: messages when they
/// come, copies and sums on the thread that drives.
class ScheduledCollective final : public Collective {
 public:
  ScheduledCollective(Group& group, uint64_t sequence, OperationKind kind);

  void post(ScheduledArguments arguments, Clock::time_point deadline);

  /// Not known: a rank need not tell all others.
  bool hasPosted(int source) const override {
    (void)source;
    return false;
  }
  void sourcePosted(
      const Record& record, std::span<const std::byte> payload) override;
  /// Fails the group when a message of another rank, whatever it brings, is of
  /// a call with other arguments.
  void check(const Record& record);
  const MessageDescription& description() const {
    return arguments_.description;
  }
  void abandon() override {}
  std::string waitsFor() const override;

 private:
  enum class State : uint8_t { kWaits, kBegun, kEnded };

  bool failIf(const std::string& disagreement);
  void run();
  void begin(uint32_t index);
  void ended(uint32_t index);
  MessageKey keyOf(const Step& step) const;
  std::string peersOf(Step::Kind kind) const;

  ScheduledArguments arguments_;
  std::vector<State> states_;
  std::vector<uint32_t> waits_;  // steps that have not ended, by step
  std::deque<uint32_t> ready_;
  bool running_ = false;
};

}  // namespace automoe
