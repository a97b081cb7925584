// SPDX-License-Identifier: Apache-2.0
// send and receive on real engines: matching, flow control, errors.
#include "process_group/exchange/pairs.hpp"

#include <gtest/gtest.h>

#include <cstring>

#include "buffers.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

/// One message of 64-bit numbers.
struct Message {
  std::vector<uint64_t> numbers;
  std::shared_ptr<PairOperation> operation;
};

PairArguments argumentsOf(
    const std::vector<uint64_t>& numbers, int peer, uint64_t tag) {
  PairArguments made;
  made.peer = peer;
  made.tag = tag;
  made.data =
      reinterpret_cast<std::byte*>(const_cast<uint64_t*>(numbers.data()));
  made.bytes = numbers.size() * 8;
  return made;
}

Message send(
    Group& group,
    int peer,
    size_t count,
    uint64_t value,
    uint64_t tag = 0,
    milliseconds timeout = seconds(30)) {
  Message made{std::vector<uint64_t>(count, value), nullptr};
  made.operation =
      group.send(argumentsOf(made.numbers, peer, tag), timeout, {});
  return made;
}

Message receive(
    Group& group,
    int peer,
    size_t count,
    uint64_t tag = 0,
    milliseconds timeout = seconds(30)) {
  Message made{std::vector<uint64_t>(count, 7), nullptr};
  made.operation =
      group.receive(argumentsOf(made.numbers, peer, tag), timeout, {});
  return made;
}

void expectValue(const Message& message, uint64_t value) {
  EXPECT_EQ(
      message.numbers, std::vector<uint64_t>(message.numbers.size(), value));
}

constexpr int kAny = PairArguments::kAnySource;

class PairsTest : public ::testing::TestWithParam<Shape> {
 protected:
  PairsTest()
      : messages_(static_cast<size_t>(GetParam().size())), ranks_(GetParam()) {}

  Message& keep(int rank, Message message) {
    auto& list = messages_[static_cast<size_t>(rank)];
    list.push_back(std::make_unique<Message>(std::move(message)));
    return *list.back();
  }
  void end(int rank, const Message& message) {
    finish(ranks_.engine(rank), *message.operation);
  }

  // Before the engines: they outlive them.
  std::vector<std::vector<std::unique_ptr<Message>>> messages_;
  Ranks ranks_;
};

TEST_P(PairsTest, RingOfAllSizes) {
  ranks_.run([&](int rank) {
    const int size = ranks_.size();
    for (const size_t count : {0, 1, 1000, 1100, 7600, 8000, 200'000}) {
      const Message& sent = keep(
          rank,
          send(
              ranks_.group(rank),
              (rank + 1) % size,
              count,
              static_cast<uint64_t>(rank)));
      const int before = (rank + size - 1) % size;
      const Message& got =
          keep(rank, receive(ranks_.group(rank), before, count));
      end(rank, got);
      end(rank, sent);
      expectValue(got, static_cast<uint64_t>(before));
    }
  });
}

TEST_P(PairsTest, TagsAndOrderDecideWhichReceiveGetsAMessage) {
  ranks_.run([&](int rank) {
    if (rank == 0) {
      for (const uint64_t value : {1, 2, 3, 4}) {
        keep(rank, send(ranks_.group(0), 1, 2000, value, value % 2));
      }
    } else if (rank == 1) {
      Group& group = ranks_.group(1);
      const Message& odd = keep(rank, receive(group, 0, 2000, 1));
      const Message& even = keep(rank, receive(group, kAny, 2000, 0));
      const Message& odd2 = keep(rank, receive(group, kAny, 2000, 1));
      const Message& even2 = keep(rank, receive(group, 0, 2000, 0));
      for (const Message* it : {&even2, &odd2, &even, &odd}) {
        end(rank, *it);
      }
      expectValue(odd, 1);
      expectValue(even, 2);
      expectValue(odd2, 3);
      expectValue(even2, 4);
      EXPECT_EQ(even.operation->peer(), 0);
    }
  });
}

TEST_P(PairsTest, ManyMessagesAheadOfTheirReceives) {
  constexpr int kMessages = 3000;
  ranks_.run([&](int rank) {
    if (rank == 0) {  // 24 MB, far beyond what may ride unmatched
      for (uint64_t i = 0; i < kMessages; ++i) {
        keep(rank, send(ranks_.group(0), 1, 1000, i));
      }
    }
  });
  ranks_.run([&](int rank) {
    if (rank == 0) {
      for (const auto& it : messages_[0]) {
        end(rank, *it);
      }
    } else if (rank == 1) {
      for (uint64_t i = 0; i < kMessages; ++i) {
        const Message& got = keep(rank, receive(ranks_.group(1), 0, 1000));
        end(rank, got);
        expectValue(got, i);
      }
    }
  });
}

TEST_P(PairsTest, OtherSizeFailsBothWithBothNumbers) {
  ranks_.run([&](int rank) {
    if (rank > 1) {
      return;
    }
    const std::string text = errorOf<InvalidArgument>([&] {
      const Message& it = keep(
          rank,
          rank == 0 ? send(ranks_.group(0), 1, 100'000, 5)
                    : receive(ranks_.group(1), 0, 100));
      end(rank, it);
    });
    expectContains(text, "800000");
    expectContains(text, "800");
    expectContains(text, "the message with tag 0 of group world");
  });
}

TEST_P(PairsTest, RanksThatAreNoneAreErrors) {
  expectContains(
      errorOf<InvalidArgument>([&] { send(ranks_.group(0), 0, 1, 1); }),
      "send: dst is 0, expected another rank of group world");
  expectContains(
      errorOf<InvalidArgument>([&] { receive(ranks_.group(0), 99, 1); }),
      "recv: src is 99, expected another rank of group world");
}

TEST_P(PairsTest, TimeoutSaysWhoDidNotSend) {
  const Message& it =
      keep(0, receive(ranks_.group(0), 1, 10, 3, milliseconds(200)));
  const std::string text = errorOf<TimeoutError>([&] { end(0, it); });
  expectContains(
      text,
      "rank 0 timed out in recv from rank 1 with tag 3 in group world, waiting "
      "for rank 1 to send");
}

TEST_P(PairsTest, OnlyTheReceiveLapsesThatMay) {
  ranks_.run([&](int rank) {
    if (rank != 0) {
      return;
    }
    PairArguments wanted;
    wanted.peer = 1;
    wanted.tag = 5;
    wanted.mayLapse = true;
    const auto lapsed = ranks_.group(0).receive(wanted, milliseconds(100), {});
    try {
      finish(ranks_.engine(0), *lapsed);
      ADD_FAILURE() << "no error";
    } catch (const TimeoutError& error) {
      expectContains(
          error.what(),
          "recv from rank 1 with tag 5 has waited in vain for rank 1 to send");
    }
  });
  // Its message still finds the next one.
  ranks_.run([&](int rank) {
    if (rank == 1) {
      end(rank, keep(rank, send(ranks_.group(1), 0, 4, 9, 5)));
    } else if (rank == 0) {
      const Message& got = keep(rank, receive(ranks_.group(0), 1, 4, 5));
      end(rank, got);
      expectValue(got, 9);
    }
  });
}

TEST_P(PairsTest, RankThatLeftIsNamed) {
  ranks_.run([&](int rank) {
    if (rank == 1) {
      keep(rank, send(ranks_.group(1), 0, 10, 4));
      ranks_.group(1).leave(seconds(5));
    } else if (rank == 0) {
      const Message& last = keep(rank, receive(ranks_.group(0), 1, 10));
      end(rank, last);
      expectValue(last, 4);
      const std::string text = errorOf<PeerFailedError>([&] {
        const Message& never = keep(rank, receive(ranks_.group(0), 1, 10));
        end(rank, never);
      });
      expectContains(text, "rank 1 has left group world");
    }
  });
}

INSTANTIATE_TEST_SUITE_P(
    Shapes,
    PairsTest,
    ::testing::Values(
        Shape{{2}}, Shape{{2}, false}, Shape{{1, 1}}, Shape{{2, 2}}),
    [](const auto& info) {
      std::string name;
      for (int ranks : info.param.ranksPerNode) {
        name += (name.empty() ? "" : "_") + std::to_string(ranks);
      }
      return name + (info.param.crossMemory ? "" : "_staged");
    });

}  // namespace
}  // namespace automoe::testing
