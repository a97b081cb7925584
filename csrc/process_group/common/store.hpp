// SPDX-License-Identifier: Apache-2.0
// The key-value store through which the ranks of a new group find each other.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace automoe {

/// What the core needs of a store; the torch layer adapts c10d's, tests use
/// one in memory. Blocking calls end with an exception at the store's timeout.
class KeyValueStore {
 public:
  virtual ~KeyValueStore() = default;
  virtual void set(const std::string& key, const std::string& value) = 0;
  /// Blocks until all keys exist, then returns their values in order.
  virtual std::vector<std::string> get(
      const std::vector<std::string>& keys) = 0;
  /// Adds to a counter (created at 0) and returns its new value.
  virtual int64_t add(const std::string& key, int64_t amount) = 0;
};

}  // namespace automoe
