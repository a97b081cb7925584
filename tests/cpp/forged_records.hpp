// SPDX-License-Identifier: Apache-2.0
// A victim, and records that no good rank sends it.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "buffers.hpp"

namespace automoe::testing {

/// Ranks 1 and 2 share a node. Rank 1 is the victim; forged records come from
/// rank 2 through its mailbox, or from rank 0 by network.
class ForgedRecordTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kBlock = 100;
  static constexpr int kVictim = 1;

  ForgedRecordTest() : ranks_(Shape{{1, 2}}), other_(ranks_.join("other")) {}

  Record make(RecordKind kind, int source) {
    const std::lock_guard lock(ranks_.engine(source).mutex());
    Record record = ranks_.group(source).makeRecord(kind, 0, kVictim);
    record.sendBytes = kBlock;
    record.receiveBytes = kBlock;
    return record;
  }
  void victimPosts() {
    posted_ = post(ranks_.group(kVictim), equalSizes(3, kBlock));
  }
  void sendByMailbox(const Record& record, const std::string& payload = "") {
    Engine& engine = ranks_.engine(2);
    const std::lock_guard lock(engine.mutex());
    ranks_.group(2).peer(kVictim).mate->post(
        asBytes(record), std::as_bytes(std::span(payload)));
    engine.kick();
  }
  void sendByNetwork(const Record& record, const std::string& payload = "") {
    Engine& engine = ranks_.engine(0);
    const std::lock_guard lock(engine.mutex());
    engine.network().send(
        ranks_.group(0).peer(kVictim).process,
        asBytes(record),
        {},
        [](bool) {},
        payload);
    engine.kick();
  }
  void expectGroupFails() {
    Group& group = ranks_.group(kVictim);
    for (int i = 0; i < 20000 && group.failure() == nullptr; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    EXPECT_NE(group.failure(), nullptr);
    if (posted_.operation != nullptr) {
      ranks_.engine(kVictim).wait(
          *posted_.operation,
          Operation::Clock::now() + std::chrono::seconds(20));
      ASSERT_TRUE(posted_.operation->finished());
      EXPECT_NE(posted_.operation->error(), nullptr);
    }
    // Other groups go on.
    ranks_.run([&](int rank) {
      Group& it = *other_[static_cast<size_t>(rank)];
      finish(ranks_.engine(rank), post(it, equalSizes(3, 5000)));
    });
  }

  Posted posted_;  // before the engines: it outlives them
  Ranks ranks_;
  std::vector<std::shared_ptr<Group>> other_;
};

}  // namespace automoe::testing
