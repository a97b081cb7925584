// SPDX-License-Identifier: Apache-2.0
// Waiting for somebody else's work, with a look around now and then.
#pragma once

#include <algorithm>
#include <chrono>

namespace automoe {

/// Waits in portions until the work is done, has failed, or `until` is past.
///
/// `wait(portion)` returns the outcome, or throws: where the work has failed,
/// and also where the portion was over first. Which of both, `isDone()` does
/// not tell: the work may be done since. So a work that is done is asked again.
/// `fail()` is called inside the handler of what a failed work threw, `look()`
/// between portions; both may throw.
template <typename Wait, typename IsDone, typename Fail, typename Look>
auto waitPatiently(
    std::chrono::milliseconds portion,
    std::chrono::steady_clock::time_point until,
    Wait wait,
    IsDone isDone,
    Fail fail,
    Look look) {
  using std::chrono::milliseconds;
  using Clock = std::chrono::steady_clock;
  while (true) {
    auto next = portion;
    if (until != Clock::time_point::max()) {
      const auto left = std::chrono::ceil<milliseconds>(until - Clock::now());
      next = std::clamp(left, milliseconds(1), portion);
    }
    const bool wasDone = isDone();
    try {
      return wait(next);
    } catch (...) {
      if (wasDone) {
        fail();
        throw;
      }
      if (!isDone() && Clock::now() >= until) {
        throw;
      }
    }
    look();
  }
}

}  // namespace automoe
