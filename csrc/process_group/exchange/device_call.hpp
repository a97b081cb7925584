// SPDX-License-Identifier: Apache-2.0
// The host's side of a dispatch or combine on a device: that all ranks have
// called it with the same arguments, and that the device has come to its end.
#pragma once

#include <functional>
#include <string>

#include "process_group/exchange/device_wire.hpp"
#include "process_group/exchange/multicast.hpp"

namespace automoe {

/// What all ranks must agree on; findRowDisagreement() compares it.
struct DeviceCallFacts {
  uint64_t plan = 0;  // fingerprint
  uint8_t dtype = 0;
  uint64_t rowBytes = 0;
  uint32_t weightBytes = 0;
  uint8_t scalarBytes = 0;
  uint16_t layout = 0;
  bool captured = false;  // into a graph
  bool fenced = false;
  DeviceWire wire = DeviceWire::kAsIs;
  const char* (*dtypeName)(uint8_t) = nullptr;
};

/// How a call asks and tells whoever enqueued its work, under the engine's
/// lock.
struct DeviceStreams {
  /// Asked every ten milliseconds, until true. Must not block, and so not call
  /// the device. What it throws, as an Error, fails the group.
  std::function<bool()> happened;
  std::function<void()> failed;  // once, if the group fails before that
};

/// Carries no bytes: streams move those, and wait for nothing here. It ends
/// when every rank has posted it and `happened` says that the streams of this
/// rank are through.
class DeviceCall final : public Multicast {
 public:
  DeviceCall(Group& group, uint64_t sequence, OperationKind kind);

  /// The caller's memory is in use until its streams are through: after a
  /// failure too, when whoever `failed` tells calls unpin() in the end.
  void post(
      const DeviceCallFacts& facts,
      DeviceStreams streams,
      Clock::time_point deadline);

  void remind(Clock::time_point now) override;
  void abandon() override;
  std::string waitsFor() const override;

 private:
  uint64_t castBytes(int) const override { return 0; }
  size_t largestRow() const override { return 1; }
  size_t nextChunk(int, uint64_t, size_t, Record&) const override;
  void fill(int, const Record&, std::byte*) const override;
  void take(int source, const Record&, std::span<const std::byte>) override;
  void describe(Record& record) const override;
  std::string disagreement(const Record& theirs) const override;

  DeviceCallFacts facts_;
  DeviceStreams streams_;  // empty once they are through, or abandoned
  bool abandoned_ = false;
};

}  // namespace automoe
