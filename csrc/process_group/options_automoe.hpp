// SPDX-License-Identifier: Apache-2.0
// What a group can be given: automoe.Options.
#pragma once

#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>

namespace automoe {

constexpr const char* kBackendName = "automoe";

struct OptionsAutoMoe final : c10d::Backend::Options {
  explicit OptionsAutoMoe(
      std::chrono::milliseconds timeout = kBackendDefaultTimeout)
      : Options(kBackendName, timeout) {}

#ifdef C10D_BACKEND_HAS_HOOKS  // torch 2.14
  c10::intrusive_ptr<Options> clone() const override {
    return c10::make_intrusive<OptionsAutoMoe>(*this);
  }
#endif

  /// Whether equal rows of one all-to-all cross the network to a node once.
  /// Nothing: as AUTOMOE_MERGE_ROWS says.
  std::optional<bool> mergeRows;
  /// Pins the node of this rank; empty: as AUTOMOE_NODE says, or found.
  std::string node;
};

}  // namespace automoe
