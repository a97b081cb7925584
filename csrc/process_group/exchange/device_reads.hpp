// SPDX-License-Identifier: Apache-2.0
// How a rank reads the rows that lie in a node-mate's arena: row by row from a
// kernel, or the whole area by a copy engine first. Pure.
//
// A kernel reads what is needed and no more, but a row that two experts of the
// rank take twice, and with few blocks it does not fill the link. A copy engine
// fills it without a block, but takes every row of the area and begins late;
// and a kernel still puts the rows into place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "process_group/device/device_facts.hpp"
#include "process_group/device/device_probe.hpp"
#include "process_group/exchange/route_lists.hpp"

namespace automoe {

/// From one rank's device to another's, in GB/s.
struct ReadRates {
  double engine = 0;            // a copy engine over the link
  double kernel = 0;            // a kernel over the link, given enough blocks
  double block = 0;             // one block of it
  double memory = 0;            // rows that a kernel moves in its own memory
  double memoryBlock = 0;       // one block of it
  double copyMicroseconds = 0;  // until a copy has begun

  bool operator==(const ReadRates&) const = default;
};

/// What is assumed of a link that nobody has measured: from the sheets of the
/// GPU's generation (NVLink: all its links, as through a switch), of which a
/// copy engine reaches 0.85 and a kernel 0.75 (over PCIe 0.6); and a block has
/// 16 KiB in flight, for 1 us over NVLink, 2.5 us over PCIe and 0.5 us in the
/// own memory. Nothing where ranks cannot read each other, or it is not known
/// how.
std::optional<ReadRates> assumedRates(PairPath path, const DeviceFacts& reader);

/// The same for all node-mates of `rank`, by local rank; `nodeOf` as
/// choosePath() has it. Nothing for the rank itself.
std::vector<std::optional<ReadRates>> assumedRatesOfMates(
    std::span<const DeviceFacts> ranks, std::span<const int> nodeOf, int rank);

/// What one dispatch reads from one mate.
struct MateReads {
  double rows = 0;         // to be expected, see expectedRows()
  uint64_t rowBytes = 0;   // all tensors together
  uint64_t areaBytes = 0;  // what a copy takes; 0: there is nothing to read
};

/// How many receive rows a rank reads from the area of a local rank: exactly,
/// where the host has made the lists. Where the device has, the host knows
/// numbers of entries: those of the area are taken to be for this rank as often
/// as all of the node are.
double expectedRows(const RouteLists& lists, size_t localRank);

struct ReadFacts {
  int maxBlocks = 0;  // of a kernel; 0: enough
  size_t room = 0;    // bytes of scratch memory that copies may take
  std::vector<MateReads> mates = {};  // by local rank
};

struct ReadChoice {
  enum class By : uint8_t { kKernel, kEngine };

  By by = By::kKernel;
  bool known = false;  // the rates are; else both times are 0
  bool fits = true;    // a copy of the area fits into the room that is left
  double kernelMicroseconds = 0;
  double engineMicroseconds = 0;

  bool operator==(const ReadChoice&) const = default;
};

/// For each mate the faster way; by a kernel where rates are not known or the
/// room does not suffice, which goes to those who gain most. Fewer rates than
/// mates: the others' are not known.
std::vector<ReadChoice> chooseReads(
    const ReadFacts& facts, std::span<const std::optional<ReadRates>> rates);

/// A line for each mate that has rows, "local rank 1: read by a copy engine:
/// an area of 12.6 MB in 41 us; about 9.5 MB in 8 blocks of a kernel: 74 us".
std::vector<std::string> describeReads(
    const ReadFacts& facts, const std::vector<ReadChoice>& choices);

/// What decides, without a call: "over NVLink, a kernel reads rows of
/// node-mates at up to 338 GB/s (16 GB/s for each block), a copy engine their
/// whole area at 382 GB/s after 10 us; each call takes the faster".
std::string describeRates(PairPath path, const ReadRates& rates);

/// A line for each way that ranks have to node-mates, for encoded facts and
/// nodes as explainDevices() takes them. Throws TransportError for facts that
/// are none.
std::vector<std::string> explainReads(
    std::span<const std::string> facts, std::span<const int> nodeOf);

/// What an exchange knows of its reads, and what it last decided.
struct DeviceReads {
  /// Scratch memory for areas of mates; more than that is read by kernels.
  static constexpr size_t kRoom = size_t{256} << 20;

  std::vector<std::optional<ReadRates>> rates = {};  // by local rank
  ReadFacts facts = {};
  std::vector<ReadChoice> choices = {};
};

}  // namespace automoe
