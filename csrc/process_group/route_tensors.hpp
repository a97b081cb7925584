// SPDX-License-Identifier: Apache-2.0
// What calls on a device make of a route once, and find again.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "process_group/work_device.hpp"

namespace automoe {

/// Tensors that are copied to a device at their first use, so that later calls,
/// and graphs that capture them, copy nothing. They last as long as the route
/// does, beyond graphs that were captured with its plan. Thread-safe.
class RouteTensors {
 public:
  using Tensors = std::vector<at::Tensor>;
  enum class Kind { kPart, kSendTokens, kTerms };
  struct Key {
    Kind kind;
    std::vector<uint64_t> numbers = {};
    bool operator==(const Key&) const = default;
  };

  /// Those of the key, made by `make` at the first call, for work of the
  /// current stream of the device. ValueError where they would have to be made
  /// while that stream is captured.
  Tensors of(
      const Key& key, c10::Device device, const std::function<Tensors()>& make);

 private:
  struct Made {
    Key key;
    c10::Device device;
    Tensors tensors;
    // On a CUDA device: the stream that they were made on, and since when.
    std::optional<c10::Stream> stream;
    std::unique_ptr<CurrentStreamEvent> since;
  };

  static void useOnCurrentStream(const Made& made);

  std::mutex mutex_;
  std::vector<Made> made_;
};

}  // namespace automoe
