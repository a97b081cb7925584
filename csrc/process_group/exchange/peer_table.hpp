// SPDX-License-Identifier: Apache-2.0
// The processes that this one knows, and those among them on its node.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "process_group/common/config.hpp"
#include "process_group/exchange/posting_rule.hpp"
#include "process_group/memory/mate.hpp"

namespace automoe {

/// Another process, shared by all groups that it is in.
struct Peer {
  uint64_t process;
  std::string host;
  int64_t pid;
  UnmatchedBudget budget;
  Mate* mate = nullptr;  // while it is on this node and alive
};

/// Guarded by the engine's lock. Peers and mates stay where they are.
class PeerTable {
 public:
  explicit PeerTable(const Config& config) : config_(config) {}

  /// The peer with that id, made at the first call.
  Peer& add(uint64_t process, const std::string& host, int64_t pid);
  /// Null when there is none.
  Peer* find(uint64_t process);

  const std::vector<std::unique_ptr<Mate>>& mates() const { return mates_; }
  void addMate(std::unique_ptr<Mate> mate);
  Mate* findMate(uint64_t process) const;
  /// The mate whose process has ended when this descriptor is readable.
  Mate* mateAt(int descriptor) const;
  /// Takes a mate out. What it has put into node memory stays readable until
  /// forgetGone().
  void mateGone(const Mate& mate);
  void forgetGone() { gone_.clear(); }

 private:
  const Config& config_;
  std::map<uint64_t, std::unique_ptr<Peer>> peers_;
  std::vector<std::unique_ptr<Mate>> mates_;
  std::vector<std::unique_ptr<Mate>> gone_;
};

}  // namespace automoe
