// SPDX-License-Identifier: Apache-2.0
// Two processes of one node (here: two NodeMemory objects of one process) meet,
// write into each other's mailboxes and share extents.
#include "process_group/memory/node_memory.hpp"

#include <gtest/gtest.h>
#include <poll.h>

#include <atomic>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "process_group/common/error.hpp"
#include "processes.hpp"

namespace automoe {
namespace {

using testing::newProcess;

using Clock = std::chrono::steady_clock;

Config smallMemory(bool crossMemory = true) {
  Config config;
  config.crossMemory = crossMemory ? CrossMemory::kAlways : CrossMemory::kNever;
  config.nodeMemoryBytes = size_t{1} << 22;
  return config;
}

bool readable(int fd) {
  pollfd it = {fd, POLLIN, 0};
  return ::poll(&it, 1, 0) == 1;
}

std::unique_ptr<Mate> connectTo(NodeMemory& from, uint64_t to, NodeMemory& at) {
  return from.connect(
      to, at.address(), Clock::now() + std::chrono::seconds(20));
}

/// `listener` answers until somebody has met it.
std::unique_ptr<Mate> acceptOne(NodeMemory& listener) {
  const auto deadline = Clock::now() + std::chrono::seconds(20);
  while (Clock::now() < deadline) {
    std::vector<pollfd> fds;
    for (const int fd : listener.descriptors()) {
      if (fd != listener.doorbell()) {
        fds.push_back({fd, POLLIN, 0});
      }
    }
    ::poll(fds.data(), fds.size(), 100);
    for (const pollfd& it : fds) {
      if (it.revents != 0) {
        if (auto mate = listener.handle(it.fd)) {
          return mate;
        }
      }
    }
  }
  return nullptr;
}

/// Two processes that have met; `second` has connected to `first`.
struct Pair {
  explicit Pair(bool firstReads = true, bool secondReads = true)
      : first(firstId, smallMemory(firstReads)),
        second(secondId, smallMemory(secondReads)) {
    std::thread connector(
        [&] { atSecond = connectTo(second, firstId, first); });
    atFirst = acceptOne(first);
    connector.join();
  }

  const uint64_t firstId = newProcess();
  const uint64_t secondId = newProcess();
  NodeMemory first;
  NodeMemory second;
  std::unique_ptr<Mate> atFirst;   // the second, as the first sees it
  std::unique_ptr<Mate> atSecond;  // the first, as the second sees it
};

std::span<const std::byte> bytesOf(const std::string& text) {
  return std::as_bytes(std::span(text));
}

std::string takeFrom(Mate& mate) {
  const auto front = mate.inbox().front();
  if (!front.has_value()) {
    return "(nothing)";
  }
  std::string text(reinterpret_cast<const char*>(front->data()), front->size());
  mate.inbox().pop();
  return text;
}

TEST(NodeMemoryTest, BothSidesLearnWhoTheOtherIs) {
  const Pair pair;
  ASSERT_NE(pair.atFirst, nullptr);
  ASSERT_NE(pair.atSecond, nullptr);
  EXPECT_EQ(pair.atFirst->description().process, pair.secondId);
  EXPECT_EQ(pair.atSecond->description().process, pair.firstId);
  EXPECT_EQ(pair.atFirst->description().pid, ::getpid());
  EXPECT_EQ(pair.atSecond->description().pid, ::getpid());
}

TEST(NodeMemoryTest, EachMapsTheOthersMemory) {
  const Pair pair;
  std::memset(pair.first.segment().at(8192, 1), 0x11, 1);
  std::memset(pair.second.segment().at(8192, 1), 0x22, 1);
  EXPECT_EQ(*pair.atSecond->segment().at(8192, 1), std::byte{0x11});
  EXPECT_EQ(*pair.atFirst->segment().at(8192, 1), std::byte{0x22});
}

TEST(NodeMemoryTest, MailboxesWorkBothWaysAndKeepOrder) {
  Pair pair;
  pair.atFirst->post(bytesOf("one "), bytesOf("two"));
  pair.atFirst->post(bytesOf("three"));
  pair.atSecond->post(bytesOf("back"));
  EXPECT_EQ(takeFrom(*pair.atSecond), "one two");
  EXPECT_EQ(takeFrom(*pair.atSecond), "three");
  EXPECT_EQ(takeFrom(*pair.atSecond), "(nothing)");
  EXPECT_EQ(takeFrom(*pair.atFirst), "back");
}

TEST(NodeMemoryTest, WhatDoesNotFitIntoTheMailboxWaitsInOrder) {
  Pair pair;
  const std::string filling(pair.atFirst->maxMessage() - 16, 'x');
  const auto text = [&](int i) { return filling + std::to_string(i); };
  for (int i = 0; i < 40; ++i) {
    pair.atFirst->post(bytesOf(filling), bytesOf(std::to_string(i)));
  }
  EXPECT_FALSE(pair.atFirst->flushed());
  EXPECT_FALSE(pair.atFirst->flush());  // there is no room
  for (int i = 0; i < 40; ++i) {
    ASSERT_EQ(takeFrom(*pair.atSecond), text(i));
    if (!pair.atFirst->flushed()) {
      EXPECT_TRUE(pair.atSecond->inbox().takeRoomRequest());
      EXPECT_TRUE(pair.atFirst->flush());
    }
  }
  EXPECT_TRUE(pair.atFirst->flushed());
  EXPECT_EQ(takeFrom(*pair.atSecond), "(nothing)");
}

TEST(NodeMemoryTest, DoorbellRingsForASleeperOnly) {
  Pair pair;
  pair.atFirst->post(bytesOf("awake"));
  EXPECT_FALSE(readable(pair.second.doorbell()));
  pair.second.prepareToSleep();
  EXPECT_FALSE(readable(pair.second.doorbell()));
  pair.atFirst->post(bytesOf("asleep"));
  EXPECT_TRUE(readable(pair.second.doorbell()));
  pair.second.wokeUp();
  EXPECT_FALSE(readable(pair.second.doorbell()));
  pair.atFirst->post(bytesOf("awake again"));
  EXPECT_FALSE(readable(pair.second.doorbell()));
}

TEST(NodeMemoryTest, OwnRingWakesAnyway) {
  const NodeMemory memory(newProcess(), smallMemory());
  memory.ring();
  EXPECT_TRUE(readable(memory.doorbell()));
  memory.wokeUp();
  EXPECT_FALSE(readable(memory.doorbell()));
}

TEST(NodeMemoryTest, NobodyListeningGivesNoMate) {
  NodeMemory memory(newProcess(), smallMemory());
  EXPECT_EQ(
      memory.connect(
          newProcess(),
          "automoe-nobody",
          Clock::now() + std::chrono::seconds(5)),
      nullptr);
  std::string gone;
  {
    const NodeMemory other(newProcess(), smallMemory());
    gone = other.address();
  }
  EXPECT_EQ(
      memory.connect(
          newProcess(), gone, Clock::now() + std::chrono::seconds(5)),
      nullptr);
}

TEST(NodeMemoryTest, AnotherProcessAtTheAddressIsAnError) {
  NodeMemory first(newProcess(), smallMemory());
  NodeMemory second(newProcess(), smallMemory());
  std::atomic<bool> refused{false};
  std::thread connector([&] {
    try {
      second.connect(
          999, first.address(), Clock::now() + std::chrono::seconds(20));
    } catch (const TransportError&) {
      refused = true;
    }
  });
  while (!refused) {
    std::vector<pollfd> fds;
    for (const int fd : first.descriptors()) {
      fds.push_back({fd, POLLIN, 0});
    }
    ::poll(fds.data(), fds.size(), 20);
    for (const pollfd& it : fds) {
      if (it.revents != 0 && it.fd != first.doorbell()) {
        EXPECT_EQ(first.handle(it.fd), nullptr);
      }
    }
  }
  connector.join();
}

TEST(NodeMemoryTest, AProcessThatNeverAnswersIsAnErrorAtTheDeadline) {
  NodeMemory first(newProcess(), smallMemory());
  NodeMemory second(newProcess(), smallMemory());
  // The kernel accepts for the first, which never looks.
  EXPECT_THROW(
      second.connect(
          newProcess(),
          first.address(),
          Clock::now() + std::chrono::milliseconds(50)),
      TransportError);
}

// ---- extents ----

TEST(NodeMemoryTest, ExtentIsFreeOnceAllReadersAreDone) {
  Pair pair;
  const size_t before = pair.first.allocatedBytes();
  const auto extent = pair.first.allocate(1000, 2);
  ASSERT_TRUE(extent.has_value());
  std::memset(extent->data, 0x77, 1000);
  const Segment& seen = pair.atSecond->segment();
  EXPECT_EQ(std::memcmp(seen.at(extent->offset, 1000), extent->data, 1000), 0);
  EXPECT_EQ(pair.first.collect(), 0);
  NodeMemory::doneReading(seen, extent->offset);
  EXPECT_EQ(NodeMemory::readers(seen, extent->offset), 1);
  EXPECT_EQ(pair.first.collect(), 0);
  NodeMemory::doneReading(seen, extent->offset);
  EXPECT_EQ(pair.first.collect(), 1);
  EXPECT_EQ(pair.first.allocatedBytes(), before);
  EXPECT_EQ(pair.first.collect(), 0);
}

TEST(NodeMemoryTest, OneMoreReaderKeepsAnExtent) {
  NodeMemory memory(newProcess(), smallMemory());
  const auto extent = memory.allocate(10, 1);
  ASSERT_TRUE(extent.has_value());
  NodeMemory::addReader(memory.segment(), extent->offset);
  NodeMemory::doneReading(memory.segment(), extent->offset);
  EXPECT_EQ(memory.collect(), 0);
  NodeMemory::doneReading(memory.segment(), extent->offset);
  EXPECT_EQ(memory.collect(), 1);
}

TEST(NodeMemoryTest, CollectFreesOnlyWhatNobodyReads) {
  NodeMemory memory(newProcess(), smallMemory());
  std::vector<NodeMemory::Extent> extents;
  for (int i = 0; i < 20; ++i) {
    extents.push_back(memory.allocate(5000, 1).value());
  }
  for (size_t i = 0; i < extents.size(); i += 2) {
    NodeMemory::doneReading(memory.segment(), extents[i].offset);
  }
  EXPECT_EQ(memory.collect(), 10);
  for (size_t i = 1; i < extents.size(); i += 2) {
    EXPECT_EQ(NodeMemory::readers(memory.segment(), extents[i].offset), 1);
    NodeMemory::doneReading(memory.segment(), extents[i].offset);
  }
  EXPECT_EQ(memory.collect(), 10);
  EXPECT_EQ(memory.allocatedBytes(), 0);
}

TEST(NodeMemoryTest, FullMemoryGivesNoExtent) {
  NodeMemory memory(newProcess(), smallMemory());
  EXPECT_FALSE(memory.allocate(size_t{1} << 22, 1).has_value());
  EXPECT_FALSE(
      memory.allocate(std::numeric_limits<size_t>::max(), 1).has_value());
  EXPECT_EQ(memory.allocatedBytes(), 0);
  EXPECT_TRUE(memory.allocate(size_t{1} << 21, 1).has_value());
  EXPECT_FALSE(memory.allocate(size_t{1} << 21, 1).has_value());
}

TEST(NodeMemoryTest, OffsetsThatAreNoExtentAreErrors) {
  const NodeMemory memory(newProcess(), smallMemory());
  const Segment& segment = memory.segment();
  for (const uint64_t offset :
       {uint64_t{0},
        uint64_t{63},
        uint64_t{8200},
        segment.bytes() + 64,
        ~uint64_t{0},
        ~uint64_t{63}}) {
    EXPECT_THROW(NodeMemory::readers(segment, offset), TransportError)
        << offset;
    EXPECT_THROW(NodeMemory::addReader(segment, offset), TransportError);
    EXPECT_THROW(NodeMemory::doneReading(segment, offset), TransportError);
  }
}

// ---- direct reads ----

TEST(NodeMemoryTest, MateIsReadDirectlyWhereBothMayAndTheProbeSucceeds) {
  const Pair pair;
  const std::vector<uint64_t> tensor = {1, 2, 3, 4};
  uint64_t first = 0;
  const bool allowed = readProcessMemory(
      ::getpid(),
      reinterpret_cast<uint64_t>(tensor.data()),
      reinterpret_cast<std::byte*>(&first),
      sizeof(first));
  EXPECT_EQ(pair.atFirst->description().readable, allowed);
  EXPECT_EQ(pair.atFirst->description().readsUs, allowed);
  EXPECT_EQ(pair.atSecond->description().readable, allowed);
  EXPECT_EQ(pair.atSecond->description().readsUs, allowed);
  if (!allowed) {
    GTEST_SKIP() << "this kernel forbids process_vm_readv";
  }
  std::vector<uint64_t> copy(tensor.size());
  pair.atFirst->read(
      reinterpret_cast<uint64_t>(tensor.data()),
      reinterpret_cast<std::byte*>(copy.data()),
      copy.size() * sizeof(uint64_t));
  EXPECT_EQ(copy, tensor);
  std::byte byte;
  EXPECT_THROW(pair.atFirst->read(8, &byte, 1), TransportError);
}

TEST(NodeMemoryTest, CrossMemoryOffMeansThatThisSideDoesNotRead) {
  const Pair pair(true, false);
  const bool allowed = pair.atFirst->description().readable;
  EXPECT_FALSE(pair.atSecond->description().readable);
  EXPECT_FALSE(pair.atFirst->description().readsUs);
  EXPECT_EQ(pair.atSecond->description().readsUs, allowed);
  const Pair neither(false, false);
  EXPECT_FALSE(neither.atFirst->description().readable);
  EXPECT_FALSE(neither.atFirst->description().readsUs);
  EXPECT_FALSE(neither.atSecond->description().readable);
  EXPECT_FALSE(neither.atSecond->description().readsUs);
}

}  // namespace
}  // namespace automoe
