// SPDX-License-Identifier: Apache-2.0
// What the groups of this process have on CUDA devices.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "process_group/exchange/device_exchange.hpp"
#include "process_group/exchange/peer_choice.hpp"
#include "process_group/group_registry.hpp"
#include "process_group/known_routes.hpp"

namespace automoe {

/// The devices of one group: one of each rank, the same as long as the group
/// lasts. Thread-safe.
class DeviceGroup {
 public:
  /// Collective: the ranks tell each other what they know of their devices, all
  /// choose the same, and make what they have chosen. Throws where the
  /// communication fails; that devices cannot reach each other is a reason to
  /// stage, not an error.
  DeviceGroup(const RegisteredGroup& group, int ordinal);
  ~DeviceGroup();
  DeviceGroup(const DeviceGroup&) = delete;
  DeviceGroup& operator=(const DeviceGroup&) = delete;

  int ordinal() const { return ordinal_; }
  /// Throws ValueError for another device than the group's.
  void checkOrdinal(c10::Device device) const;
  /// Null where CUDA tensors are staged through the host, on every rank then.
  DeviceExchange* exchange() const { return exchange_.get(); }
  /// The one of the exchange, to be kept beyond it.
  const std::shared_ptr<Device>& device() const { return device_; }
  /// The lists of a route on the device, copied there once. `route` is what
  /// KnownRoutes finds for `words`. Throws as DeviceExchange::upload().
  std::shared_ptr<const DeviceRoute> listsOf(
      const KnownRoute& route, const at::Tensor& words);
  /// What was found on the ranks, what is used, and why.
  std::string text() const;
  /// How all_to_all_single goes, once that was measured.
  std::optional<PeerChoice> peerChoice() const;
  void setPeerChoice(PeerChoice choice);

 private:
  const int ordinal_;
  std::string text_;
  mutable std::mutex choiceMutex_;
  std::optional<PeerChoice> peerChoice_;
  std::shared_ptr<Device> device_;
  // The first to end: then no stream uses what is above.
  std::unique_ptr<DeviceExchange> exchange_;
};

/// That of the group, made for this device at the first call, which is
/// collective.
std::shared_ptr<DeviceGroup> deviceGroupOf(
    const RegisteredGroup& group, int ordinal);
/// Before a group leaves: waits until its devices are through.
void forgetDeviceGroup(const Group* group);
/// How CUDA tensors go between the ranks of a group of ours, and why.
/// ValueError for another name.
std::string describeDeviceGroup(const std::string& groupName);

}  // namespace automoe
