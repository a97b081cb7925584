// SPDX-License-Identifier: Apache-2.0
// send and receive: which message a receive gets.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "process_group/exchange/messages.hpp"

namespace automoe {

/// One send or receive. `data` must stay until OperationCallbacks::released.
struct PairArguments {
  int peer = 0;  // group rank; kAnySource for a receive from whoever is first
  uint64_t tag = 0;
  std::byte* data = nullptr;  // only read by a send
  uint64_t bytes = 0;
  uint8_t dtype = 0;
  const char* (*dtypeName)(uint8_t) = nullptr;
  /// A receive that ends with TimeoutError when its deadline has passed, while
  /// the group goes on.
  bool mayLapse = false;

  static constexpr int kAnySource = -1;
};

class PairOperation final : public Operation {
 public:
  PairOperation(
      uint64_t number,
      Clock::time_point deadline,
      bool sends,
      PairArguments arguments);

  std::string title() const;
  std::string waitsFor() const override;
  /// Of a receive that has ended: whose message it was.
  int peer() const { return arguments_.peer; }
  /// True while `rank` has to send or to take its message.
  bool needs(int rank) const;
  bool mayLapse() const { return arguments_.mayLapse; }

 private:
  friend class PairTable;

  const bool sends_;
  bool matched_ = false;
  PairArguments arguments_;
};

/// As in MPI: messages of one sender are looked at in the order in which they
/// were sent, and each goes to the first receive, in the order of their calls,
/// that names its tag and either its sender or any.
///
/// Guarded by the engine's lock.
class PairTable {
 public:
  explicit PairTable(Group& group);

  void send(const std::shared_ptr<PairOperation>& operation);
  void receive(const std::shared_ptr<PairOperation>& operation);
  /// A kMessage of a pair.
  void arrived(const Record& record, std::span<const std::byte> payload);

  const std::list<std::shared_ptr<PairOperation>>& pending() const {
    return pending_;
  }
  bool empty() const { return pending_.empty(); }
  /// Ends what has come to its deadline and may lapse.
  void lapse(Operation::Clock::time_point now);
  /// The group has failed: forgets everything, and returns what was pending.
  std::list<std::shared_ptr<PairOperation>> abandon();

 private:
  struct Kept {
    Record record;
    std::string payload;
  };
  using Pending = std::list<std::shared_ptr<PairOperation>>;

  void next(const Record& record, std::span<const std::byte> payload);
  void match(
      const std::shared_ptr<PairOperation>& operation,
      const Record& record,
      std::span<const std::byte> payload);
  MessageDescription describe(const PairOperation& operation) const;
  void ended(const std::shared_ptr<PairOperation>& operation);

  Group& group_;
  Pending pending_;  // all that have not ended
  std::vector<std::shared_ptr<PairOperation>> receives_;  // not matched
  std::list<Kept> unexpected_;
  std::map<std::pair<int, uint64_t>, Kept> early_;  // by source and number
  std::vector<uint64_t> sent_;                      // messages, by rank
  std::vector<uint64_t> seen_;
};

}  // namespace automoe
