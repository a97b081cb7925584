// SPDX-License-Identifier: Apache-2.0
// One collective of all ranks in a ScheduleWorld: inputs, guarded memory, what
// must come out, and how it is run.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "kernels/elementwise.hpp"
#include "process_group/exchange/schedule_parts.hpp"
#include "process_group/exchange/schedules.hpp"
#include "process_group/topology/topology.hpp"
#include "schedule_world.hpp"

namespace automoe::testing {

using Bytes = std::vector<std::byte>;
using kernels::ElementType;
using kernels::ReduceOperation;
using kernels::Reduction;

struct Layout {
  std::string name;
  std::vector<int64_t> labels;

  int size() const { return static_cast<int>(labels.size()); }
  Topology topology(int rank) const {
    return Topology::fromNodeLabels(labels, rank);
  }
};

inline const std::vector<Layout> kLayouts = {
    {"1", {0}},
    {"2", {0, 0}},
    {"1+1", {0, 1}},
    {"4", {0, 0, 0, 0}},
    {"2x2", {0, 0, 1, 1}},
    {"4x2", {0, 0, 1, 1, 2, 2, 3, 3}},
    {"3+2", {0, 0, 0, 1, 1}},
    {"3+1+2 interleaved", {0, 1, 2, 0, 2, 0}},
    {"8x1", {0, 1, 2, 3, 4, 5, 6, 7}},
    {"12x1", {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}},
    {"9 nodes mixed", {0, 1, 2, 3, 4, 0, 5, 6, 7, 8, 3, 6, 0}},
};

/// Bytes between two guards, at any address; all poisoned at first.
class Memory {
 public:
  Memory(uint64_t bytes, std::size_t shift)
      : all_(kGuard * 2 + shift + bytes, kPoison),
        begin_(kGuard + shift),
        bytes_(bytes) {}
  Memory(const Bytes& content, std::size_t shift)
      : Memory(content.size(), shift) {
    std::ranges::copy(content, data());
  }

  std::byte* data() { return all_.data() + begin_; }
  uint64_t bytes() const { return bytes_; }
  Bytes content() const {
    const auto begin = all_.begin() + static_cast<std::ptrdiff_t>(begin_);
    return {begin, begin + static_cast<std::ptrdiff_t>(bytes_)};
  }
  bool guardsAreWhole() const {
    const auto all = std::span(all_);
    const auto isPoison = [](std::byte b) { return b == kPoison; };
    return std::ranges::all_of(all.first(begin_), isPoison) &&
           std::ranges::all_of(all.subspan(begin_ + bytes_), isPoison);
  }

 private:
  static constexpr std::size_t kGuard = 64;
  static constexpr std::byte kPoison{0xA5};

  Bytes all_;
  std::size_t begin_;
  uint64_t bytes_;
};

/// Bits of eight bytes of elements: random ones are cleared or set, so that
/// floating point numbers are near 1.
struct Pattern {
  uint64_t keep = ~uint64_t{0};
  uint64_t set = 0;
};
inline Pattern patternOf(ElementType type) {
  switch (type) {
    case ElementType::kBool:
      return {0x0101010101010101, 0};
    case ElementType::kFloat16:
      return {0x8FFF8FFF8FFF8FFF, 0x3000300030003000};
    case ElementType::kBFloat16:
      return {0x81FF81FF81FF81FF, 0x3E003E003E003E00};
    case ElementType::kFloat32:
      return {0x81FFFFFF81FFFFFF, 0x3E0000003E000000};
    case ElementType::kFloat64:
      return {0x803FFFFFFFFFFFFF, 0x3FC0000000000000};
    default:
      return {};
  }
}

/// Numbers of a type, from a rank and a block. Sums depend on their order.
inline Bytes numbers(ElementType type, uint64_t bytes, int rank, int block) {
  const Pattern pattern = patternOf(type);
  auto state = static_cast<uint64_t>(rank * 1000 + block + 1);
  Bytes content(bytes);
  for (uint64_t i = 0; i < bytes; i += 8) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    const uint64_t word =
        ((state ^ (state >> 32)) & pattern.keep) | pattern.set;
    std::memcpy(&content[i], &word, std::min<uint64_t>(8, bytes - i));
  }
  return content;
}

inline Bytes sumOf(
    const Reduction& reduction, const std::vector<Bytes>& inputs, bool last) {
  std::vector<const std::byte*> addresses;
  for (const Bytes& input : inputs) {
    addresses.push_back(input.data());
  }
  Bytes sum(inputs[0].size());
  kernels::reduceElements(reduction, sum.data(), addresses, sum.size(), last);
  return sum;
}

/// The tree of small sums over many nodes: [begin, end) in order, where the
/// first one has a child at each power of two.
inline Bytes treeSum(
    const Reduction& reduction,
    const std::vector<Bytes>& nodes,
    std::size_t begin,
    std::size_t end,
    bool last) {
  std::vector<Bytes> inputs{nodes[begin]};
  for (std::size_t step = 1; begin + step < end; step *= 2) {
    const std::size_t childEnd = std::min(begin + 2 * step, end);
    inputs.push_back(treeSum(reduction, nodes, begin + step, childEnd, false));
  }
  return inputs.size() == 1 && !last ? inputs[0]
                                     : sumOf(reduction, inputs, last);
}

/// The sum in the order that is promised: over ranks, then over nodes.
inline Bytes expectedSum(
    const Layout& layout,
    const Reduction& reduction,
    const std::vector<Bytes>& inputs,
    bool tree = false) {
  const Topology topology = layout.topology(0);
  std::vector<Bytes> nodes;
  const bool oneNode = topology.numNodes() == 1;
  for (int node = 0; node < topology.numNodes(); ++node) {
    std::vector<Bytes> here;
    for (const int rank : topology.ranksOf(node)) {
      here.push_back(inputs[static_cast<std::size_t>(rank)]);
    }
    nodes.push_back(
        here.size() == 1 && !oneNode ? here[0]
                                     : sumOf(reduction, here, oneNode));
  }
  if (oneNode) {
    return nodes[0];
  }
  return tree ? treeSum(reduction, nodes, 0, nodes.size(), true)
              : sumOf(reduction, nodes, true);
}

/// What makes one run differ from another.
struct Variant {
  unsigned seed = 0;
  int root = 0;
  bool inPlace = false;
  bool uneven = false;  // blocks
  Reduction reduction = {};
};

/// Memory, expectations and schedules of all ranks.
class Call {
 public:
  Call(const Layout& layout, const Variant& variant)
      : layout_(layout), variant_(variant) {}

  std::size_t ranks() const { return layout_.labels.size(); }
  Topology topology(std::size_t rank) const {
    return layout_.topology(static_cast<int>(rank));
  }
  bool isRoot(std::size_t rank) const {
    return rank == static_cast<std::size_t>(variant_.root);
  }
  /// Of a rank, where blocks are uneven: none, half, or all of the elements.
  uint64_t blockBytes(uint64_t bytes, std::size_t rank) const {
    const std::size_t each = kernels::elementBytes(variant_.reduction.type);
    return variant_.uneven ? bytes / each * ((rank + 1) % 3) / 2 * each : bytes;
  }
  Bytes numbersOf(
      uint64_t bytes, std::size_t rank, std::size_t block = 0) const {
    return numbers(
        variant_.reduction.type,
        bytes,
        static_cast<int>(rank),
        static_cast<int>(block));
  }

  /// Memory that must be as `expected` at the end.
  std::byte* output(const Bytes& before, const Bytes& expected) {
    expected_.push_back(expected);
    return allocate({before, shift()});
  }
  std::byte* output(const Bytes& expected) {
    expected_.push_back(expected);
    return allocate({expected.size(), shift()});
  }
  /// Memory that must stay as it is.
  std::byte* input(const Bytes& content) { return output(content, content); }

  void add(Schedule schedule) { schedules_.push_back(std::move(schedule)); }
  const Schedule& schedule(std::size_t rank) const { return schedules_[rank]; }

  /// True if this rank receives nothing, from other nodes or at all.
  bool waitsForNobody(std::size_t rank, bool matesCount = true) const {
    const Topology topology = this->topology(rank);
    for (const Step& step : schedules_[rank].steps()) {
      if (step.kind == Step::Kind::kReceive &&
          (matesCount || topology.nodeOf(step.peer) != topology.node())) {
        return false;
      }
    }
    return true;
  }

  /// Runs the schedules and checks all memory. Returns the world, for what it
  /// has counted. Once only.
  ScheduleWorld run() {
    ScheduleWorld world(
        topology(0), std::move(schedules_), variant_.reduction, variant_.seed);
    EXPECT_EQ(world.run(), "") << describe();
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      EXPECT_TRUE(memory_[i].guardsAreWhole()) << describe();
      EXPECT_TRUE(memory_[i].content() == expected_[i])
          << describe() << ", memory " << i << " of " << memory_.size();
    }
    return world;
  }

 private:
  std::string describe() const {
    const Reduction& reduction = variant_.reduction;
    return concat(
        layout_.name,
        ", seed ",
        variant_.seed,
        ", root ",
        variant_.root,
        variant_.inPlace ? ", in place, " : ", ",
        kernels::nameOf(reduction.operation),
        " of ",
        kernels::nameOf(reduction.type));
  }
  std::size_t shift() const { return variant_.seed % 3; }
  std::byte* allocate(Memory memory) {
    memory_.push_back(std::move(memory));
    return memory_.back().data();
  }

  const Layout& layout_;
  Variant variant_;
  std::vector<Memory> memory_;  // a moved vector keeps its bytes in place
  std::vector<Bytes> expected_;
  std::vector<Schedule> schedules_;
};

}  // namespace automoe::testing
