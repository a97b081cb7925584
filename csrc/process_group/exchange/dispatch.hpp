// SPDX-License-Identifier: Apache-2.0
// Rows to their experts, along a plan.
#pragma once

#include <optional>
#include <string>

#include "process_group/exchange/multicast.hpp"
#include "process_group/exchange/row_moves.hpp"

namespace automoe {

/// Each send row crosses once; every rank of the receiving node copies it to
/// the receive rows of its experts as the chunks arrive.
class Dispatch final : public Multicast {
 public:
  Dispatch(Group& group, uint64_t sequence);
  ~Dispatch() override;

  /// This rank's own call. The rows to itself have been moved already.
  void post(
      DispatchArguments arguments,
      const Route& route,
      Clock::time_point deadline);

 private:
  uint64_t castBytes(int node) const override;
  size_t largestRow() const override;
  size_t nextChunk(
      int node, uint64_t next, size_t room, Record& chunk) const override;
  void fill(int node, const Record& chunk, std::byte* to) const override;
  void take(int source, const Record& chunk, std::span<const std::byte> bytes)
      override;
  void describe(Record& record) const override;
  std::string disagreement(const Record& theirs) const override;

  DispatchArguments arguments_;
  std::optional<Route> route_;
};

}  // namespace automoe
