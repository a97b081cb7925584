// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/agreement.hpp"

#include <utility>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

// Bits of graphUseOf().
constexpr uint32_t kCaptured = 1;
constexpr uint32_t kFenced = 2;
// Above them: wireUseOf().
constexpr unsigned kWireShift = 8;

std::string amount(uint64_t bytes, uint32_t elementBytes) {
  return concat(
      bytes,
      " bytes (",
      bytes / elementBytes,
      " elements of ",
      elementBytes,
      ")");
}

// The lower rank first, so that both say the same.
std::pair<const Record&, const Record&> inOrder(
    const Record& theirs, const Record& own) {
  return own.source < theirs.source
             ? std::pair<const Record&, const Record&>(own, theirs)
             : std::pair<const Record&, const Record&>(theirs, own);
}

template <typename Value>
std::string difference(
    const Record& low,
    const Record& high,
    const std::string& what,
    const Value& lowHas,
    const Value& highHas) {
  return concat(
      "rank ",
      low.source,
      " has ",
      what,
      lowHas,
      ", rank ",
      high.source,
      " has ",
      highHas,
      "; they must agree");
}

}  // namespace

std::string findDisagreement(
    const PostedSide& theirs,
    const PostedSide& own,
    uint32_t elementBytes,
    const char* (*dtypeName)(uint8_t)) {
  // The lower rank's direction first, so that both say the same.
  const bool ownFirst = own.rank < theirs.rank;
  const PostedSide& low = ownFirst ? own : theirs;
  const PostedSide& high = ownFirst ? theirs : own;
  const auto differ = [&](const PostedSide& from, const PostedSide& to) {
    return from.sendBytes == to.receiveBytes
               ? std::string()
               : concat(
                     "rank ",
                     from.rank,
                     " sends ",
                     amount(from.sendBytes, elementBytes),
                     " to rank ",
                     to.rank,
                     ", but rank ",
                     to.rank,
                     " expects ",
                     amount(to.receiveBytes, elementBytes),
                     "; input_split_sizes of the one must equal "
                     "output_split_sizes of the other");
  };
  std::string text = differ(low, high);
  if (text.empty()) {
    text = differ(high, low);
  }
  const bool anything = own.sendBytes + theirs.sendBytes > 0;
  if (text.empty() && anything && low.dtype != high.dtype &&
      dtypeName != nullptr) {
    text = concat(
        "rank ",
        low.rank,
        " posted tensors of ",
        dtypeName(low.dtype),
        ", rank ",
        high.rank,
        " of ",
        dtypeName(high.dtype),
        "; they must agree");
  }
  return text;
}

std::string findRowDisagreement(
    const Record& theirs,
    const Record& own,
    const char* (*dtypeName)(uint8_t)) {
  const auto [low, high] = inOrder(theirs, own);
  const auto differ =
      [&low, &high](
          const std::string& what, const auto& lowHas, const auto& highHas) {
        return difference(low, high, what, lowHas, highHas);
      };
  if (low.plan != high.plan) {
    return differ("plan ", low.plan, high.plan);
  }
  if (low.dtype != high.dtype && dtypeName != nullptr) {
    return differ("rows of ", dtypeName(low.dtype), dtypeName(high.dtype));
  }
  if (low.receiveBytes != high.receiveBytes) {
    return differ("bytes in a row: ", low.receiveBytes, high.receiveBytes);
  }
  if (low.elementBytes != high.elementBytes) {
    return differ("bytes in a weight: ", low.elementBytes, high.elementBytes);
  }
  if (low.layout != high.layout) {
    return differ(
        "tensors of types and sizes with hash ", low.layout, high.layout);
  }
  if (low.scalarBytes != high.scalarBytes) {
    return differ(
        "bytes of scalars beside a row: ",
        static_cast<int>(low.scalarBytes),
        static_cast<int>(high.scalarBytes));
  }
  return "";
}

uint32_t wireUseOf(DeviceWire wire) {
  return static_cast<uint32_t>(wire) << kWireShift;
}

std::string findWireDisagreement(const Record& theirs, const Record& own) {
  const auto [low, high] = inOrder(theirs, own);
  const auto wireOf = [](const Record& it) {
    return nameOf(static_cast<DeviceWire>(it.rows >> kWireShift));
  };
  if (low.rows >> kWireShift == high.rows >> kWireShift) {
    return "";
  }
  return concat(
      "rank ",
      low.source,
      " sends rows between nodes ",
      wireOf(low),
      ", rank ",
      high.source,
      " ",
      wireOf(high),
      "; they must agree");
}

uint32_t graphUseOf(bool captured, bool fenced) {
  return (captured ? kCaptured : 0U) | (fenced ? kFenced : 0U);
}

std::string findGraphDisagreement(const Record& theirs, const Record& own) {
  const auto [low, high] = inOrder(theirs, own);
  if (((low.rows ^ high.rows) & kCaptured) != 0) {
    const auto does = [](const Record& it) {
      return (it.rows & kCaptured) != 0 ? " captures this call into a graph"
                                        : " does not";
    };
    const bool lowFirst = (low.rows & kCaptured) != 0;
    const Record& first = lowFirst ? low : high;
    const Record& second = lowFirst ? high : low;
    return concat(
        "rank ",
        first.source,
        does(first),
        ", rank ",
        second.source,
        does(second),
        "; all ranks must capture the same calls, and replay them together");
  }
  if (low.rows != high.rows) {
    return difference(
        low,
        high,
        "fenced: ",
        (low.rows & kFenced) != 0 ? "yes" : "no",
        (high.rows & kFenced) != 0 ? "yes" : "no");
  }
  return "";
}

std::string findMessageDisagreement(
    const Record& theirs,
    const Record& own,
    const char* (*dtypeName)(uint8_t),
    const char* (*reductionName)(uint8_t)) {
  const auto [low, high] = inOrder(theirs, own);
  if (low.dtype != high.dtype && dtypeName != nullptr) {
    return difference(
        low, high, "tensors of ", dtypeName(low.dtype), dtypeName(high.dtype));
  }
  if (low.scalarBytes != high.scalarBytes && reductionName != nullptr) {
    return difference(
        low,
        high,
        "the operation ",
        reductionName(low.scalarBytes),
        reductionName(high.scalarBytes));
  }
  if (low.owner != high.owner) {
    return difference(low, high, "the root ", low.owner, high.owner);
  }
  if (low.receiveBytes != high.receiveBytes) {
    return difference(
        low, high, "bytes in all: ", low.receiveBytes, high.receiveBytes);
  }
  if (low.sendBytes == high.sendBytes) {
    return "";
  }
  return concat(
      "rank ",
      theirs.source,
      " sends ",
      theirs.sendBytes,
      " bytes to rank ",
      own.source,
      ", which expects ",
      own.sendBytes);
}

}  // namespace automoe
