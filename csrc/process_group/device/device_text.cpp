// SPDX-License-Identifier: Apache-2.0
#include "process_group/device/device_text.hpp"

#include <algorithm>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

constexpr size_t kMostTexts = 6;

std::string deviceLine(const DeviceFacts& facts) {
  if (!facts.hasDevice()) {
    return concat("rank ", facts.rank, ": no CUDA device: ", facts.whyNoDevice);
  }
  std::string line = concat(
      "rank ",
      facts.rank,
      ": ",
      facts.name,
      " (",
      facts.ordinal,
      "), compute ",
      facts.computeMajor,
      ".",
      facts.computeMinor,
      ", PCI ",
      facts.pciBusId,
      ", ",
      facts.nvlinks > 0 ? plural(static_cast<size_t>(facts.nvlinks), "NVLink")
                        : "no NVLink");
  if (facts.inFabric) {
    line += concat(", fabric clique ", facts.clique);
  }
  if (!facts.flagsSupported) {
    line += ", its streams cannot wait for memory (update the driver)";
  }
  return line;
}

}  // namespace

std::string plural(size_t count, const char* noun) {
  return concat(count, " ", noun, count == 1 ? "" : "s");
}

std::string rankText(const Ranks& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size();) {
    size_t end = i + 1;
    while (end < ranks.size() && ranks[end]->rank == ranks[end - 1]->rank + 1) {
      ++end;
    }
    text += concat(i == 0 ? "" : ", ", ranks[i]->rank);
    if (end - i > 1) {
      text += concat("-", ranks[end - 1]->rank);
    }
    i = end;
  }
  return text;
}

std::string joinSome(const std::vector<std::string>& texts) {
  std::string joined;
  for (size_t i = 0; i < std::min(texts.size(), kMostTexts); ++i) {
    joined += concat(i == 0 ? "" : ", ", texts[i]);
  }
  if (texts.size() > kMostTexts) {
    joined += concat(" and ", texts.size() - kMostTexts, " more");
  }
  return joined;
}

void explainRanks(const Ranks& ranks, std::vector<std::string>& lines) {
  for (const DeviceFacts* facts : ranks) {
    lines.push_back(deviceLine(*facts));
    for (const std::string& note : facts->notes) {
      lines.push_back(concat("rank ", facts->rank, ": ", note));
    }
  }
}

}  // namespace automoe
