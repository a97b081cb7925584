// SPDX-License-Identifier: Apache-2.0
// What the host still knows of plans whose tensors are on a device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>

#include <deque>
#include <mutex>

namespace automoe {

/// The offsets of the latest plans that were made here and whose route is
/// alive: a part of them needs no copy from the device. Thread-safe.
class RecentPlans {
 public:
  static RecentPlans& instance();

  /// Both on the CPU.
  void add(const at::Tensor& route, const at::Tensor& offsets);
  /// Undefined for a route that is not, or no longer, known.
  at::Tensor offsetsOf(const at::Tensor& route);

 private:
  static constexpr size_t kMost = 64;

  struct Known {
    c10::weak_intrusive_ptr<c10::StorageImpl> route;
    at::Tensor offsets;
  };

  std::mutex mutex_;
  std::deque<Known> plans_;  // the latest first
};

}  // namespace automoe
