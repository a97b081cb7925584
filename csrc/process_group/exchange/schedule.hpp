// SPDX-License-Identifier: Apache-2.0
// What one rank does in a collective: messages, copies and sums, and which of
// them come after which. Pure: it is made from a topology and addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace automoe {

struct Step {
  enum class Kind : uint8_t { kSend, kReceive, kReduce, kCopy };

  Kind kind = Kind::kSend;
  int peer = -1;      // group rank, of a message
  uint32_t slot = 0;  // names the message among those from rank to rank
  bool last = false;  // a reduction that also divides
  const std::byte* from = nullptr;  // send, copy
  std::byte* to = nullptr;          // all others
  uint64_t bytes = 0;
  std::vector<const std::byte*> inputs;  // reduce
  uint32_t waitsFor = 0;                 // how many steps it comes after
  std::vector<uint32_t> then;            // steps that come after it
};

/// A graph of steps. A step begins once all steps that it comes after have
/// ended: a send has ended when its memory may be written again, a receive
/// when all bytes are there. Steps that are not ordered may run in any order
/// and at the same time.
///
/// A message goes from a send to the receive with the same slot on the other
/// rank (one the other way may have that slot too), and both name the same
/// number of bytes; zero is allowed. Both ranks derive equal slots from what
/// they share: topology, root and sizes.
class Schedule {
 public:
  using Id = uint32_t;
  using After = std::span<const Id>;

  Id send(
      int peer,
      uint32_t slot,
      const std::byte* from,
      uint64_t bytes,
      After after = {});
  Id receive(
      int peer, uint32_t slot, std::byte* to, uint64_t bytes, After after = {});
  /// See kernels::reduceElements.
  Id reduce(
      std::byte* to,
      std::vector<const std::byte*> inputs,
      uint64_t bytes,
      bool last,
      After after = {});
  Id copy(
      std::byte* to, const std::byte* from, uint64_t bytes, After after = {});

  /// Memory that lives as long as the schedule, not initialised.
  std::byte* scratch(uint64_t bytes);

  const std::vector<Step>& steps() const { return steps_; }
  /// All steps so far, for what comes after everything.
  std::vector<Id> all() const;

 private:
  Id add(Step step, After after);

  std::vector<Step> steps_;
  std::vector<std::unique_ptr<std::byte[]>> scratch_;
};

}  // namespace automoe
