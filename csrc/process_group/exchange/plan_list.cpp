// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/plan_list.hpp"

#include <cstring>
#include <limits>

#include "process_group/common/bytes.hpp"
#include "process_group/common/error.hpp"
#include "process_group/exchange/route_hash.hpp"
#include "process_group/exchange/route_words.hpp"

namespace automoe {
namespace {

template <typename... Parts>
[[noreturn]] void refuse(int source, const Parts&... parts) {
  throw TransportError(concat("the plan of rank ", source, ": ", parts...));
}

/// Bytes that hold 0 .. largest.
size_t widthOf(int64_t largest) {
  if (largest <= std::numeric_limits<uint8_t>::max()) {
    return sizeof(uint8_t);
  }
  return largest <= std::numeric_limits<uint16_t>::max() ? sizeof(uint16_t)
                                                         : sizeof(uint32_t);
}

template <typename Item>
void narrow(std::span<const int32_t> values, char* to) {
  for (size_t i = 0; i < values.size(); ++i) {
    const auto item = static_cast<Item>(values[i]);
    std::memcpy(to + i * sizeof(Item), &item, sizeof(Item));
  }
}

void narrow(std::span<const int32_t> values, size_t width, char* to) {
  switch (width) {
    case sizeof(uint8_t):
      return narrow<uint8_t>(values, to);
    case sizeof(uint16_t):
      return narrow<uint16_t>(values, to);
    default:
      return narrow<uint32_t>(values, to);
  }
}

template <typename Item>
std::vector<int32_t> widen(const std::byte* from, size_t size) {
  std::vector<int32_t> values(size);
  for (size_t i = 0; i < size; ++i) {
    Item item;
    std::memcpy(&item, from + i * sizeof(Item), sizeof(Item));
    values[i] = static_cast<int32_t>(item);
  }
  return values;
}

std::vector<int32_t> widen(const std::byte* from, size_t width, size_t size) {
  switch (width) {
    case sizeof(uint8_t):
      return widen<uint8_t>(from, size);
    case sizeof(uint16_t):
      return widen<uint16_t>(from, size);
    default:
      return widen<uint32_t>(from, size);
  }
}

/// True when all values are in [low, high]; 2^31 and more have become negative.
bool allWithin(std::span<const int32_t> values, int64_t low, int64_t high) {
  uint32_t outside = 0;
  const auto room = static_cast<uint32_t>(high - low);
  for (const int32_t value : values) {
    outside |= static_cast<uint32_t>(value) - static_cast<uint32_t>(low) > room;
  }
  return outside == 0;
}

}  // namespace

uint64_t fingerprintOf(std::span<const PlanFacts> facts) {
  uint64_t hash = kHashSeed;
  for (const PlanFacts& it : facts) {
    hash = mixHash(hash, static_cast<uint64_t>(it.numExperts));
    hash = mixHash(hash, static_cast<uint64_t>(it.topK));
    hash = mixHash(hash, static_cast<uint64_t>(it.numTokens));
    hash = mixHash(hash, it.idsHash);
    hash = mixHash(hash, it.mapHash);
  }
  return hash;
}

std::string encodePlanList(
    const PlanFacts& facts,
    std::span<const int32_t> rowBegin,
    std::span<const int32_t> experts,
    int64_t numExpertsOnNode) {
  const size_t numRows = rowBegin.size() - 1;
  std::vector<int32_t> counts(numRows);
  for (size_t row = 0; row < numRows; ++row) {
    counts[row] = rowBegin[row + 1] - rowBegin[row];
  }
  ByteWriter writer;
  writer.put(facts);
  writer.put(static_cast<uint32_t>(numRows));
  std::string list = writer.take();
  const size_t countBytes = widthOf(facts.topK);
  const size_t expertBytes = widthOf(numExpertsOnNode - 1);
  const size_t countsAt = list.size();
  const size_t expertsAt = countsAt + numRows * countBytes;
  list.resize(expertsAt + experts.size() * expertBytes);
  narrow(counts, countBytes, list.data() + countsAt);
  narrow(experts, expertBytes, list.data() + expertsAt);
  return list;
}

PlanFacts readPlanFacts(int source, std::span<const std::byte> list) {
  if (list.size() < sizeof(PlanFacts) + sizeof(uint32_t)) {
    refuse(source, list.size(), " bytes are too few");
  }
  PlanFacts facts;
  std::memcpy(&facts, list.data(), sizeof(facts));
  return facts;
}

PlanList decodePlanList(
    int source,
    const PlanFacts& facts,
    std::span<const std::byte> list,
    int64_t numExpertsOnNode) {
  if (facts.numTokens < 0 || facts.numTokens > kMaxRouteLength / facts.topK) {
    refuse(source, "it says it has ", facts.numTokens, " tokens");
  }
  ByteReader reader(list.data(), list.size());
  reader.take(sizeof(PlanFacts));
  const auto numRows = reader.get<uint32_t>();
  if (numRows > facts.numTokens) {
    refuse(source, numRows, " rows of ", facts.numTokens, " tokens");
  }
  const size_t countBytes = widthOf(facts.topK);
  if (reader.remaining() / countBytes < numRows) {
    refuse(source, list.size(), " bytes are too few for ", numRows, " rows");
  }
  const std::byte* at = list.data() + (list.size() - reader.remaining());
  PlanList decoded{widen(at, countBytes, numRows), {}};
  if (!allWithin(decoded.counts, 1, facts.topK)) {
    refuse(source, "a row does not have 1 to ", facts.topK, " experts");
  }
  uint64_t numExperts = 0;
  for (const int32_t count : decoded.counts) {
    numExperts += static_cast<uint64_t>(count);
  }
  const size_t expertBytes = widthOf(numExpertsOnNode - 1);
  at += numRows * countBytes;
  const auto left = static_cast<size_t>(list.data() + list.size() - at);
  if (left != numExperts * expertBytes) {
    refuse(
        source,
        numExperts,
        " experts of ",
        expertBytes,
        " bytes in ",
        left,
        " bytes");
  }
  decoded.experts = widen(at, expertBytes, numExperts);
  const bool known = numExpertsOnNode > 0 &&
                     allWithin(decoded.experts, 0, numExpertsOnNode - 1);
  if (numExperts > 0 && !known) {
    refuse(source, "an expert that is not one of ", numExpertsOnNode, " here");
  }
  return decoded;
}

}  // namespace automoe
