// SPDX-License-Identifier: Apache-2.0
// The exchange of a plan: every rank tells every node what it has for it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "process_group/exchange/multicast.hpp"
#include "process_group/exchange/route.hpp"

namespace automoe {

/// Carries the lists of a RouteBuilder; it is complete when this has ended.
class PlanExchange final : public Multicast {
 public:
  PlanExchange(Group& group, uint64_t sequence);
  ~PlanExchange() override;

  void post(std::shared_ptr<RouteBuilder> builder, Clock::time_point deadline);

 private:
  uint64_t castBytes(int node) const override;
  size_t largestRow() const override { return 1; }
  size_t nextChunk(
      int node, uint64_t next, size_t room, Record& chunk) const override;
  void fill(int node, const Record& chunk, std::byte* to) const override;
  void take(int source, const Record& chunk, std::span<const std::byte> bytes)
      override;
  void describe(Record& record) const override;
  std::string disagreement(const Record& theirs) const override;

  std::shared_ptr<RouteBuilder> builder_;
  std::vector<std::string> lists_;     // by node
  std::vector<std::string> received_;  // by source, until complete
};

}  // namespace automoe
