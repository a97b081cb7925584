// SPDX-License-Identifier: Apache-2.0
// The groups of this process, and which of them a message is for.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

#include "process_group/exchange/group.hpp"
#include "process_group/exchange/record.hpp"

namespace automoe {

/// Guarded by the engine's lock.
class GroupTable {
 public:
  using Bytes = std::span<const std::byte>;

  /// Adds a group and hands it what has arrived for it already: another rank
  /// may use a group before this one has built it.
  void add(std::shared_ptr<Group> group);
  /// Hands a message to its group; an error in it fails the group. Messages
  /// for a group not built yet are kept, up to a bound; foreign ones and those
  /// for a group that is over are dropped.
  void deliver(Bytes header, Bytes payload, const Mate* fromMate);
  /// Calls `visit` for each group; groups may end meanwhile.
  template <typename Visit>
  void forEach(const Visit& visit) {
    const auto groups = groups_;
    for (const auto& [id, group] : groups) {
      visit(*group);
    }
  }
  std::vector<std::shared_ptr<Group>> all() const;
  bool anyBusy() const;
  bool empty() const { return groups_.empty(); }
  /// Forgets the groups that nobody needs this rank in any more.
  void removeEnded();

 private:
  struct Early {
    std::string message;  // header and payload
    const Mate* fromMate;
  };

  void keepEarly(
      uint64_t group, Bytes header, Bytes payload, const Mate* fromMate);

  std::map<uint64_t, std::shared_ptr<Group>> groups_;
  std::unordered_set<uint64_t> ended_;
  std::map<uint64_t, std::vector<Early>> early_;
  size_t earlyBytes_ = 0;
};

}  // namespace automoe
