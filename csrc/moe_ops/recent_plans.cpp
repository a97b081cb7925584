// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/recent_plans.hpp"

namespace automoe {

RecentPlans& RecentPlans::instance() {
  // Leaked: tensors must not be dropped while the process exits.
  static auto* plans = new RecentPlans();
  return *plans;
}

void RecentPlans::add(const at::Tensor& route, const at::Tensor& offsets) {
  const std::lock_guard lock(mutex_);
  std::erase_if(plans_, [](const Known& it) { return it.route.expired(); });
  plans_.push_front(
      {c10::weak_intrusive_ptr<c10::StorageImpl>(
           route.storage().getWeakStorageImpl()),
       offsets});
  if (plans_.size() > kMost) {
    plans_.pop_back();
  }
}

at::Tensor RecentPlans::offsetsOf(const at::Tensor& route) {
  const std::lock_guard lock(mutex_);
  const c10::StorageImpl* wanted = route.storage().unsafeGetStorageImpl();
  for (const Known& it : plans_) {
    if (!it.route.expired() && it.route._unsafe_get_target() == wanted) {
      return it.offsets;
    }
  }
  return {};
}

}  // namespace automoe
