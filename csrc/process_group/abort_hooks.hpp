// SPDX-License-Identifier: Apache-2.0
// What users want to run when a group fails or is aborted.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <utility>

namespace automoe {

/// Thread-safe. The hooks run once, at the first failure.
class AbortHooks {
 public:
  using Hook = std::function<void()>;

  void add(int64_t id, Hook hook) {
    const std::lock_guard lock(mutex_);
    hooks_[id] = std::move(hook);
  }
  void remove(int64_t id) {
    const std::lock_guard lock(mutex_);
    hooks_.erase(id);
  }
  bool empty() const {
    const std::lock_guard lock(mutex_);
    return hooks_.empty();
  }
  void run() {
    std::map<int64_t, Hook> hooks;
    {
      const std::lock_guard lock(mutex_);
      hooks = std::exchange(hooks_, {});
    }
    for (const auto& [id, hook] : hooks) {
      hook();
    }
  }

 private:
  mutable std::mutex mutex_;
  std::map<int64_t, Hook> hooks_;
};

}  // namespace automoe
