// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/operation.hpp"

#include <algorithm>
#include <utility>

namespace automoe {

void Operation::finish(std::exception_ptr error) {
  if (finished()) {
    return;
  }
  if (error == nullptr && callbacks_.completing) {
    callbacks_.completing();
  }
  error_ = std::move(error);
  ended_ = Clock::now();
  finished_.store(true, std::memory_order_release);
  if (callbacks_.finished) {
    callbacks_.finished();
  }
  unpin();
}

void Operation::unpin() {
  pins_ -= 1;
  if (pins_ == 0 && callbacks_.released) {
    callbacks_.released();
  }
}

Operation::Clock::time_point deadlineAfter(std::chrono::milliseconds timeout) {
  constexpr auto kLongest = std::chrono::hours(24 * 365);
  return Operation::Clock::now() +
         std::min<std::chrono::milliseconds>(timeout, kLongest);
}

}  // namespace automoe
