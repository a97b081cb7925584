// SPDX-License-Identifier: Apache-2.0
// How the ranks of a group make something on their devices together.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <span>
#include <vector>

#include "process_group/exchange/device_memory.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {

/// Steps that all ranks of a group take, one after the other.
class DeviceAgreement {
 public:
  DeviceAgreement(
      Engine& engine, Group& group, std::chrono::milliseconds timeout)
      : engine_(engine), group_(group), timeout_(timeout) {}

  /// Takes a step, and waits for all ranks to have taken it. Where one has
  /// thrown, every rank throws DeviceError that names the first of those, and
  /// why. Throws the failure of the group.
  void take(const std::function<void()>& step);
  /// The same for a step in which the hosts of this rank and of the ranks
  /// `with` wait for each other (each names the other one). When one of them
  /// throws, or the group fails, `interrupt` is called, by another thread: it
  /// makes the step throw. What all hear then is what the first one has thrown.
  void takeWith(
      std::span<const int> with,
      const std::function<void()>& step,
      const std::function<void()>& interrupt);
  /// The same for a step that offers something; what all have, by rank.
  std::vector<DeviceMemory::Offer> gather(
      const std::function<DeviceMemory::Offer()>& step);

 private:
  std::vector<DeviceMemory::Offer> gather(
      const std::function<DeviceMemory::Offer()>& step,
      const std::atomic<bool>& interrupted);

  Engine& engine_;
  Group& group_;
  const std::chrono::milliseconds timeout_;
};

}  // namespace automoe
