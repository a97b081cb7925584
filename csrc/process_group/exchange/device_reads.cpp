// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_reads.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "process_group/common/error.hpp"
#include "process_group/device/device_text.hpp"

namespace automoe {
namespace {

using Rates = std::optional<ReadRates>;

// Of the vendors' numbers, what is reached.
constexpr double kEngineShare = 0.85;
constexpr double kKernelShare = 0.75;
constexpr double kPcieKernelShare = 0.6;
// KB in flight, by microseconds until they are there.
constexpr double kInFlight = 16.384;
constexpr double kNvlinkDelay = 1;
constexpr double kPcieDelay = 2.5;
constexpr double kMemoryDelay = 0.5;
constexpr double kCopyMicroseconds = 10;

/// GB/s in each direction: NVLink 5 from compute capability 10 on, before that
/// 2 to 4.
double nvlinkRate(const DeviceFacts& device) {
  return device.nvlinks * (device.computeMajor >= 10 ? 50.0 : 25.0);
}

/// Of 16 lanes: generation 5 from Hopper on, 4 for Ampere and Ada.
double pcieRate(const DeviceFacts& device) {
  if (device.computeMajor >= 9) {
    return 64;
  }
  return device.computeMajor == 8 ? 32 : 16;
}

/// What a copy moves: half of what the memory reads and writes.
double memoryRate(const DeviceFacts& device) {
  const auto both = [&] {
    if (device.computeMajor >= 10) {
      return 8000.0;
    }
    if (device.computeMajor == 9) {
      return 3350.0;
    }
    return device.computeMajor == 8 ? 1500.0 : 900.0;
  };
  return both() / 2 * kEngineShare;
}

/// Microseconds for bytes at GB/s.
double timeOf(double bytes, double rate) {
  return bytes / (rate * 1000);
}

double rateOf(double all, double block, int maxBlocks) {
  return maxBlocks == 0 ? all : std::min(all, block * maxBlocks);
}

ReadChoice judge(const MateReads& mate, int maxBlocks, const Rates& rates) {
  ReadChoice choice;
  if (!rates.has_value() || mate.areaBytes == 0) {
    return choice;
  }
  choice.known = true;
  const double bytes = mate.rows * static_cast<double>(mate.rowBytes);
  choice.kernelMicroseconds =
      timeOf(bytes, rateOf(rates->kernel, rates->block, maxBlocks));
  choice.engineMicroseconds =
      rates->copyMicroseconds +
      timeOf(static_cast<double>(mate.areaBytes), rates->engine) +
      timeOf(bytes, rateOf(rates->memory, rates->memoryBlock, maxBlocks));
  return choice;
}

std::string megabytes(double bytes) {
  return concat(std::round(bytes / 1e5) / 10, " MB");
}

std::string blocks(int maxBlocks) {
  return maxBlocks == 0
             ? "a kernel"
             : plural(static_cast<size_t>(maxBlocks), "block") + " of a kernel";
}

std::string describe(
    const MateReads& mate, const ReadChoice& choice, int maxBlocks) {
  const std::string area =
      concat("an area of ", megabytes(static_cast<double>(mate.areaBytes)));
  const std::string rows = concat(
      "about ", megabytes(mate.rows * static_cast<double>(mate.rowBytes)));
  if (!choice.known) {
    return concat("read by a kernel, ", rows, ": the link is not known");
  }
  const std::string byEngine =
      concat(area, " in ", std::round(choice.engineMicroseconds), " us");
  const std::string byKernel = concat(
      rows,
      " in ",
      blocks(maxBlocks),
      ": ",
      std::round(choice.kernelMicroseconds),
      " us");
  if (choice.by == ReadChoice::By::kEngine) {
    return concat("read by a copy engine, ", byEngine, "; ", byKernel);
  }
  return concat(
      "read by a kernel, ",
      byKernel,
      "; by a copy engine, ",
      byEngine,
      choice.fits ? "" : ", but there is no room for it");
}

}  // namespace

std::optional<ReadRates> assumedRates(
    PairPath path, const DeviceFacts& reader) {
  ReadRates rates;
  rates.memory = memoryRate(reader);
  rates.memoryBlock = kInFlight / kMemoryDelay;
  rates.copyMicroseconds = kCopyMicroseconds;
  switch (path) {
    case PairPath::kSameDevice:
      rates.engine = rates.memory;
      rates.kernel = rates.memory;
      rates.block = rates.memoryBlock;
      return rates;
    case PairPath::kNvlink:
      rates.engine = nvlinkRate(reader) * kEngineShare;
      rates.kernel = nvlinkRate(reader) * kKernelShare;
      rates.block = kInFlight / kNvlinkDelay;
      return reader.nvlinks > 0 ? Rates(rates) : std::nullopt;
    case PairPath::kPcie:
      rates.engine = pcieRate(reader) * kEngineShare;
      rates.kernel = pcieRate(reader) * kPcieKernelShare;
      rates.block = kInFlight / kPcieDelay;
      return rates;
    case PairPath::kNoPeerAccess:
    case PairPath::kUnknown:
      break;
  }
  return std::nullopt;
}

std::vector<std::optional<ReadRates>> assumedRatesOfMates(
    std::span<const DeviceFacts> ranks, std::span<const int> nodeOf, int rank) {
  std::vector<Rates> rates;
  const auto self = static_cast<size_t>(rank);
  for (size_t other = 0; other < ranks.size(); ++other) {
    if (nodeOf[other] != nodeOf[self]) {
      continue;
    }
    rates.push_back(
        other == self
            ? std::nullopt
            : assumedRates(pairPath(ranks[self], ranks[other]), ranks[self]));
  }
  return rates;
}

double expectedRows(const RouteLists& lists, size_t localRank) {
  if (!lists.receivedFrom.empty()) {
    return static_cast<double>(lists.receivedFrom[localRank]);
  }
  size_t all = 0;
  for (const RouteLists::Area& area : lists.areas) {
    all += area.landEntries;
  }
  if (all == 0) {
    return 0;
  }
  // Receive rows beyond all entries are padding.
  const auto rows = static_cast<double>(std::min(lists.numReceiveRows(), all));
  return rows * static_cast<double>(lists.areas[localRank].landEntries) /
         static_cast<double>(all);
}

std::vector<ReadChoice> chooseReads(
    const ReadFacts& facts, std::span<const std::optional<ReadRates>> rates) {
  std::vector<ReadChoice> choices;
  for (size_t i = 0; i < facts.mates.size(); ++i) {
    choices.push_back(judge(
        facts.mates[i],
        facts.maxBlocks,
        i < rates.size() ? rates[i] : std::nullopt));
  }
  const auto gain = [&](size_t i) {
    return choices[i].kernelMicroseconds - choices[i].engineMicroseconds;
  };
  std::vector<size_t> order(choices.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::stable_sort(
      order, [&](size_t a, size_t b) { return gain(a) > gain(b); });
  size_t left = facts.room;
  for (const size_t i : order) {
    ReadChoice& choice = choices[i];
    choice.fits = facts.mates[i].areaBytes <= left;
    if (choice.known && choice.fits && gain(i) > 0) {
      choice.by = ReadChoice::By::kEngine;
      left -= facts.mates[i].areaBytes;
    }
  }
  return choices;
}

std::vector<std::string> describeReads(
    const ReadFacts& facts, const std::vector<ReadChoice>& choices) {
  std::vector<std::string> lines;
  for (size_t i = 0; i < facts.mates.size(); ++i) {
    if (facts.mates[i].areaBytes > 0) {
      lines.push_back(concat(
          "local rank ",
          i,
          ": ",
          describe(facts.mates[i], choices[i], facts.maxBlocks)));
    }
  }
  return lines;
}

std::string describeRates(PairPath path, const ReadRates& rates) {
  return concat(
      path == PairPath::kSameDevice ? "on the same device"
                                    : concat("over ", nameOf(path)),
      ", a kernel reads rows of node-mates at up to ",
      std::round(rates.kernel),
      " GB/s (",
      std::round(rates.block),
      " GB/s for each block), a copy engine their whole area at ",
      std::round(rates.engine),
      " GB/s after ",
      std::round(rates.copyMicroseconds),
      " us (assumed, not measured); each call takes the faster");
}

std::vector<std::string> explainReads(
    std::span<const std::string> facts, std::span<const int> nodeOf) {
  std::vector<DeviceFacts> ranks;
  for (const std::string& bytes : facts) {
    ranks.push_back(decodeFacts(bytes));
  }
  std::vector<std::string> lines;
  for (size_t i = 0; i < ranks.size(); ++i) {
    for (size_t j = 0; j < ranks.size(); ++j) {
      if (i == j || nodeOf[i] != nodeOf[j] || !ranks[i].hasDevice() ||
          !ranks[j].hasDevice()) {
        continue;
      }
      const PairPath path = pairPath(ranks[i], ranks[j]);
      const Rates rates = assumedRates(path, ranks[i]);
      const std::string line = rates ? describeRates(path, *rates) : "";
      if (rates && std::ranges::find(lines, line) == lines.end()) {
        lines.push_back(line);
      }
    }
  }
  return lines;
}

}  // namespace automoe
