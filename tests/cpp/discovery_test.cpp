// SPDX-License-Identifier: Apache-2.0
// How ranks find out who shares a node, and groups that must not meet.
#include "process_group/exchange/discovery.hpp"

#include <gtest/gtest.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <cstring>
#include <numeric>
#include <optional>

#include "buffers.hpp"

namespace automoe::testing {
namespace {

using std::chrono::seconds;

Config unpinned() {
  Config config;
  config.interface = "lo";
  config.nodeMemoryBytes = size_t{1} << 26;
  return config;
}

/// A store that counts, or that nobody may touch.
class CountingStore : public MemoryStore {
 public:
  void set(const std::string& key, const std::string& value) override {
    uses += 1;
    MemoryStore::set(key, value);
  }
  std::vector<std::string> get(const std::vector<std::string>& keys) override {
    uses += 1;
    return MemoryStore::get(keys);
  }
  int64_t add(const std::string& key, int64_t amount) override {
    uses += 1;
    return MemoryStore::add(key, amount);
  }
  std::atomic<int> uses{0};
};

std::shared_ptr<Group> join(
    Engine& engine,
    KeyValueStore& store,
    int rank,
    int size,
    const std::string& name = "group") {
  return joinGroup(engine, store, rank, size, name, seconds(30));
}

void exchange(
    const std::vector<Engine*>& engines,
    const std::vector<std::shared_ptr<Group>>& groups,
    uint64_t bytes) {
  const int size = static_cast<int>(groups.size());
  runThreads(size, [&](int rank) {
    const auto index = static_cast<size_t>(rank);
    finish(*engines[index], post(*groups[index], equalSizes(size, bytes)));
  });
}

TEST(DiscoveryTest, UnpinnedRanksOfOneMachineAreOneNode) {
  std::vector<std::unique_ptr<Engine>> engines;
  for (int rank = 0; rank < 3; ++rank) {
    engines.push_back(std::make_unique<Engine>(unpinned()));
  }
  MemoryStore store;
  runThreads(3, [&](int rank) {
    const auto group =
        join(*engines[static_cast<size_t>(rank)], store, rank, 3);
    EXPECT_EQ(group->topology().describe(), "3 ranks on 1 node");
    EXPECT_EQ(group->topology().rank(), rank);
  });
  // One node needs no network.
  EXPECT_EQ(engines[0]->describeNetwork(), "");
}

TEST(DiscoveryTest, PinsDecideAndOrderThem) {
  const std::vector<std::string> pins = {"b", "a", "b", "c", "a"};
  std::vector<std::unique_ptr<Engine>> engines;
  for (const std::string& pin : pins) {
    Config config = unpinned();
    config.node = pin;
    engines.push_back(std::make_unique<Engine>(config));
  }
  MemoryStore store;
  std::vector<std::shared_ptr<Group>> groups(pins.size());
  runThreads(5, [&](int rank) {
    const auto index = static_cast<size_t>(rank);
    groups[index] = join(*engines[index], store, rank, 5);
    const Topology& topology = groups[index]->topology();
    EXPECT_EQ(topology.describe(), "5 ranks on 3 nodes (2, 2, 1)");
    EXPECT_EQ(topology.nodeOf(0), topology.nodeOf(2));
    EXPECT_EQ(topology.nodeOf(1), topology.nodeOf(4));
    EXPECT_EQ(topology.nodeOf(3), 2);
  });
  std::vector<Engine*> all;
  for (const auto& it : engines) {
    all.push_back(it.get());
  }
  exchange(all, groups, 20000);
}

TEST(DiscoveryTest, PinnedAndUnpinnedRanksAreDifferentNodes) {
  Config pinned = unpinned();
  pinned.node = "x";
  Engine first(pinned);
  Engine second(unpinned());
  MemoryStore store;
  runThreads(2, [&](int rank) {
    const auto group = join(rank == 0 ? first : second, store, rank, 2);
    EXPECT_EQ(group->topology().numNodes(), 2);
  });
}

TEST(DiscoveryTest, GroupOfOneRankTouchesNoStore) {
  Engine engine(unpinned());
  CountingStore store;
  const auto group = join(engine, store, 0, 1);
  EXPECT_EQ(store.uses, 0);
  EXPECT_EQ(group->topology().size(), 1);
  finish(engine, post(*group, equalSizes(1, 100)));
}

TEST(DiscoveryTest, SameStoreAndNameAgainMakesAGroupOfItsOwn) {
  Ranks ranks(Shape{{2, 1}});
  std::vector<Engine*> engines;
  for (int rank = 0; rank < 3; ++rank) {
    engines.push_back(&ranks.engine(rank));
  }
  MemoryStore store;
  std::vector<std::vector<std::shared_ptr<Group>>> made;
  for (int i = 0; i < 3; ++i) {
    std::vector<std::shared_ptr<Group>> groups(3);
    runThreads(3, [&](int rank) {
      groups[static_cast<size_t>(rank)] =
          join(ranks.engine(rank), store, rank, 3, "again");
    });
    EXPECT_EQ(groups[0]->id(), groups[1]->id());
    EXPECT_EQ(groups[0]->id(), groups[2]->id());
    made.push_back(groups);
  }
  EXPECT_NE(made[0][0]->id(), made[1][0]->id());
  EXPECT_NE(made[1][0]->id(), made[2][0]->id());
  // The first fails; the others neither hear of it nor get its messages.
  const Posted pending = post(*made[0][0], equalSizes(3, 100));
  made[0][1]->abort("on purpose");
  exchange(engines, made[1], 5000);
  exchange(engines, made[2], 5000);
  ranks.engine(0).wait(
      *pending.operation, Operation::Clock::now() + seconds(20));
  EXPECT_NE(pending.operation->error(), nullptr);
}

TEST(DiscoveryTest, TwoNamesInOneStoreDoNotMix) {
  Ranks ranks(Shape{{3}});
  MemoryStore store;
  for (const int size : {2, 3, 2}) {
    runThreads(size, [&](int rank) {
      const auto group =
          join(ranks.engine(rank), store, rank, size, concat(size, " ranks"));
      EXPECT_EQ(group->topology().size(), size);
    });
  }
}

TEST(DiscoveryTest, SubgroupsInAnyOrderShareTheEngines) {
  Ranks ranks(Shape{{3, 3, 2}});
  const std::vector<std::vector<int>> members = {
      {0, 2, 4, 6},     // strided
      {7, 6, 5, 4},     // reversed
      {5, 0, 7, 2, 1},  // permuted
      {3},
      {4, 3}};
  for (const auto& group : members) {
    const int size = static_cast<int>(group.size());
    MemoryStore store;
    std::vector<std::shared_ptr<Group>> groups(group.size());
    std::vector<Engine*> engines;
    std::vector<int64_t> labels;
    for (const int rank : group) {
      engines.push_back(&ranks.engine(rank));
      labels.push_back(ranks.group(0).topology().nodeOf(rank));
    }
    runThreads(size, [&](int rank) {
      const auto index = static_cast<size_t>(rank);
      groups[index] = join(*engines[index], store, rank, size, "sub");
      EXPECT_EQ(
          groups[index]->topology(), Topology::fromNodeLabels(labels, rank));
    });
    for (const uint64_t bytes : {1, 9000, 100000}) {
      exchange(engines, groups, bytes);
    }
  }
}

TEST(DiscoveryTest, StoreThatEndsWithAnErrorEndsTheJoinWithIt) {
  class Broken : public MemoryStore {
   public:
    std::vector<std::string> get(const std::vector<std::string>&) override {
      throw TimeoutError("the store is not there");
    }
  };
  Engine engine(unpinned());
  Broken store;
  EXPECT_EQ(
      errorOf<TimeoutError>([&] { join(engine, store, 0, 2); }),
      "the store is not there");
}

TEST(DiscoveryTest, InterfaceThatIsMissingOnOneRankIsAnErrorOnAll) {
  std::vector<std::unique_ptr<Engine>> engines;
  for (const char* interface : {"lo", "nosuch0"}) {
    Config config = unpinned();
    config.node = interface;
    config.interface = interface;
    engines.push_back(std::make_unique<Engine>(config));
  }
  MemoryStore store;
  runThreads(2, [&](int rank) {
    const std::string text = errorOf<InvalidArgument>(
        [&] { join(*engines[static_cast<size_t>(rank)], store, rank, 2); });
    expectContains(text, "nosuch0");
  });
}

// ---- another network namespace is another node ----

/// Gives the calling thread a network of its own, with loopback up; why not,
/// where that is not permitted.
std::optional<std::string> enterOwnNetwork() {
  if (::unshare(CLONE_NEWNET) != 0) {
    return concat("unshare(CLONE_NEWNET): ", strerror(errno));
  }
  const FileDescriptor socket(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  ifreq request = {};
  std::strcpy(request.ifr_name, "lo");
  request.ifr_flags = IFF_UP;
  if (!socket.valid() || ::ioctl(socket.get(), SIOCSIFFLAGS, &request) != 0) {
    return concat("lo of the new network: ", strerror(errno));
  }
  return std::nullopt;
}

/// Two ranks of one machine, the second in a network namespace of its own.
void runInTwoNetworks(
    const Config& config,
    const std::function<void(Engine& engine, int rank)>& body) {
  std::optional<std::string> denied;
  std::unique_ptr<Engine> apart;
  // Its engine's thread inherits the namespace; this thread is gone then.
  std::thread([&] {
    denied = enterOwnNetwork();
    if (!denied.has_value()) {
      apart = std::make_unique<Engine>(config);
    }
  }).join();
  if (denied.has_value()) {
    GTEST_SKIP() << "needs a network namespace: " << *denied;
  }
  Engine here(config);
  runThreads(2, [&](int rank) {
    if (rank == 1 && enterOwnNetwork().has_value()) {
      throw Error("no second network namespace");
    }
    body(rank == 0 ? here : *apart, rank);
  });
}

TEST(DiscoveryTest, UnpinnedRankOfAnotherNetworkIsAnotherNode) {
  MemoryStore store;
  runInTwoNetworks(unpinned(), [&](Engine& engine, int rank) {
    const auto group = join(engine, store, rank, 2);
    EXPECT_EQ(group->topology().describe(), "2 ranks on 2 nodes (1 each)");
  });
}

TEST(DiscoveryTest, PinOverTwoNetworksIsAnErrorThatNamesBothRanks) {
  Config config = unpinned();
  config.node = "same";
  MemoryStore store;
  runInTwoNetworks(config, [&](Engine& engine, int rank) {
    const std::string text = errorOf<InvalidArgument>(
        [&] { join(engine, store, rank, 2, "pinned"); });
    expectContains(text, "rank 1 cannot join group pinned");
    expectContains(text, "AUTOMOE_NODE is 'same' on rank 1");
    expectContains(text, "on rank 0");
    expectContains(text, "leave it unset");
  });
}

}  // namespace
}  // namespace automoe::testing
