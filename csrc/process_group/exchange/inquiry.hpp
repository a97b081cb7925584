// SPDX-License-Identifier: Apache-2.0
// Who is missing: asked of all ranks when a collective does not end in time.
#pragma once

#include <chrono>
#include <optional>
#include <string>
#include <vector>

namespace automoe {

/// A rank that waits knows whose bytes it waits for, but that one may wait for
/// somebody else. So each is asked whether it has made the call; engines answer
/// whatever their user threads do.
class Inquiry {
 public:
  using Clock = std::chrono::steady_clock;

  Inquiry(int size, int ownRank, Clock::time_point now);

  void answered(int rank, bool called);
  /// All have answered, or have had time to.
  bool over(Clock::time_point now) const;
  /// "rank 3 has not called it", "ranks 4, 5 do not answer", or that all have.
  std::string result() const;

 private:
  std::vector<std::optional<bool>> called_;  // by rank
  Clock::time_point until_;
};

}  // namespace automoe
