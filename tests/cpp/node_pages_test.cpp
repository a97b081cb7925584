// SPDX-License-Identifier: Apache-2.0
// Pages of node memory that stay mapped on their own.
#include "process_group/memory/node_pages.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "process_group/common/error.hpp"
#include "processes.hpp"

namespace automoe {
namespace {

using testing::newProcess;

const auto kPage = static_cast<size_t>(::sysconf(_SC_PAGESIZE));

Config smallConfig() {
  Config config;
  config.nodeMemoryBytes = size_t{1} << 24;
  return config;
}

TEST(NodePages, MatesSeeTheSameWholePages) {
  NodeMemory memory(newProcess(), smallConfig());
  // So that no extent begins with a page, and that there is something in it.
  const auto before = memory.allocate(3 * kPage, 1);
  std::memset(before->data, 0x55, 3 * kPage);
  NodeMemory::doneReading(memory.segment(), before->offset);
  memory.collect();
  const auto small = memory.allocate(100, 1);
  ASSERT_TRUE(small.has_value());
  const NodePages own = NodePages::make(memory, kPage + 1);
  EXPECT_EQ(own.bytes(), 2 * kPage);
  EXPECT_EQ(own.offset() % kPage, 0U);
  EXPECT_TRUE(std::all_of(own.data(), own.data() + own.bytes(), [](auto it) {
    return it == std::byte{0};
  }));
  const NodePages mates =
      NodePages::attach(memory.segment(), own.offset(), kPage + 1);
  EXPECT_NE(own.data(), mates.data());
  own.data()[kPage + 7] = std::byte{9};
  EXPECT_EQ(mates.data()[kPage + 7], std::byte{9});
}

TEST(NodePages, StayAfterTheMemoryThatTheyAreIn) {
  std::optional<NodeMemory> memory(std::in_place, newProcess(), smallConfig());
  const NodePages pages = NodePages::make(*memory, 10);
  memory.reset();
  pages.data()[3] = std::byte{4};
  EXPECT_EQ(pages.data()[3], std::byte{4});
}

TEST(NodePages, AreGivenBack) {
  NodeMemory memory(newProcess(), smallConfig());
  const size_t before = memory.allocatedBytes();
  NodePages::Extent extent;
  {
    const NodePages pages = NodePages::make(memory, 10);
    extent = pages.extent();
  }
  EXPECT_EQ(memory.collect(), 0U);
  NodePages::giveBack(memory, extent);
  EXPECT_EQ(memory.collect(), 1U);
  EXPECT_EQ(memory.allocatedBytes(), before);
}

TEST(NodePages, RefuseWhatIsNotThere) {
  NodeMemory memory(newProcess(), smallConfig());
  EXPECT_THROW(NodePages::make(memory, size_t{1} << 24), TransportError);
  EXPECT_THROW(
      NodePages::attach(memory.segment(), size_t{1} << 24, 10), TransportError);
}

}  // namespace
}  // namespace automoe
