// SPDX-License-Identifier: Apache-2.0
// Flow control: when a payload may leave. Pure, so that a model checker can
// run it.
//
// At the call, a rank tells every other rank that it has posted, and with
// which sizes. A small payload rides with that record while few enough bytes
// are under way to a peer that has not posted (it must keep them). Any other
// leaves only when the record of its destination is here: then every byte
// that arrives has an output to go to. So a late rank costs its peers waiting
// and a bounded amount of memory, and no operation waits for room that
// another operation holds.
#pragma once

#include <cstddef>

namespace automoe {

/// Bytes under way to one peer that have not been matched by its record.
class UnmatchedBudget {
 public:
  UnmatchedBudget(size_t largestRider, size_t cap)
      : largestRider_(largestRider), cap_(cap) {}

  /// Takes `bytes` from the budget if a payload of that size may ride with
  /// its record now; else it has to wait for the destination's record.
  bool tryRide(size_t bytes) { return tryRide(bytes, largestRider_); }
  /// The same where another limit holds for one payload.
  bool tryRide(size_t bytes, size_t largest) {
    if (bytes > largest || bytes > cap_ - unmatched_) {
      return false;
    }
    unmatched_ += bytes;
    return true;
  }
  /// The destination has posted what `bytes` rode for.
  void matched(size_t bytes) { unmatched_ -= bytes; }
  size_t unmatched() const { return unmatched_; }

 private:
  size_t largestRider_;
  size_t cap_;
  size_t unmatched_ = 0;
};

}  // namespace automoe
