// SPDX-License-Identifier: Apache-2.0
// What a group can be given: automoe.Options.
#pragma once

#include <c10/util/Exception.h>

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
  /// Thread blocks that each kernel between CUDA devices takes at most;
  /// nothing: as many as are good.
  std::optional<int> maxCtas;
  /// Whether rows of a dispatch on CUDA devices cross between nodes as 8-bit
  /// floats with scales.
  bool fp8Wire = false;
  /// Bytes of the largest all_to_all_single on CUDA devices that goes through
  /// memory of the node, where all ranks are on one; nothing: as measured.
  std::optional<uint64_t> peerAllToAll;
};

/// Whether it is "fp8". Throws ValueError for what is neither that nor "exact".
inline bool checkedWire(const std::string& wire) {
  TORCH_CHECK_VALUE(
      wire == "exact" || wire == "fp8",
      "Options: wire is '",
      wire,
      "', expected 'exact' or 'fp8'");
  return wire == "fp8";
}

/// Throws ValueError where it is less than 1.
inline std::optional<int> checkedMaxCtas(std::optional<int> maxCtas) {
  TORCH_CHECK_VALUE(
      maxCtas.value_or(1) >= 1,
      "Options: max_ctas is ",
      maxCtas.value_or(1),
      ", expected at least 1, or None for no limit");
  return maxCtas;
}

}  // namespace automoe
