// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/operation.hpp"

#include <utility>

namespace automoe {

void Operation::finish(std::exception_ptr error) {
  if (finished()) {
    return;
  }
  error_ = std::move(error);
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

}  // namespace automoe
