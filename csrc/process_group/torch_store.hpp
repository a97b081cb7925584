// SPDX-License-Identifier: Apache-2.0
// The core's view of a c10d store.
#pragma once

#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <utility>
#include <vector>

#include "process_group/common/store.hpp"

namespace automoe {

class TorchStore final : public KeyValueStore {
 public:
  TorchStore(
      c10::intrusive_ptr<c10d::Store> store, std::chrono::milliseconds timeout)
      : store_(std::move(store)), timeout_(timeout) {}

  void set(const std::string& key, const std::string& value) override {
    store_->set(key, std::vector<uint8_t>(value.begin(), value.end()));
  }
  std::vector<std::string> get(const std::vector<std::string>& keys) override {
    store_->wait(keys, timeout_);
    std::vector<std::string> values;
    for (const auto& value : store_->multiGet(keys)) {
      values.emplace_back(value.begin(), value.end());
    }
    return values;
  }
  int64_t add(const std::string& key, int64_t amount) override {
    return store_->add(key, amount);
  }

 private:
  c10::intrusive_ptr<c10d::Store> store_;
  std::chrono::milliseconds timeout_;
};

}  // namespace automoe
