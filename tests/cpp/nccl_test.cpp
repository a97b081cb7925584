// SPDX-License-Identifier: Apache-2.0
// NcclNetwork over functions that only note how they are called.
#include "process_group/device/nccl.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <future>
#include <vector>

namespace automoe {
namespace {

using Functions = NcclFunctions;
using std::chrono::milliseconds;

constexpr int kRemoteError = 6;

/// What the library below was asked for, and what it answers.
struct Library {
  std::mutex mutex;
  std::vector<std::string> calls;
  std::atomic<int> state = Functions::kSuccess;
  int failSend = Functions::kSuccess;
  int initResult = Functions::kInProgress;
  Functions::Config config;
  Functions::Id id;
  std::atomic<int> aborts = 0;
  std::atomic<bool> hasGraphs = false;  // an abort waits until it has none

  void note(const std::string& call) {
    const std::lock_guard lock(mutex);
    calls.push_back(call);
  }
  std::vector<std::string> take() {
    const std::lock_guard lock(mutex);
    return std::exchange(calls, {});
  }
};

Library* library = nullptr;

Functions makeFunctions() {
  Functions functions;
  functions.getUniqueId = [](Functions::Id* id) {
    id->bytes.fill('i');
    return Functions::kSuccess;
  };
  functions.commInitRankConfig = [](Functions::Communicator* communicator,
                                    int size,
                                    Functions::Id id,
                                    int rank,
                                    Functions::Config* config) {
    library->id = id;
    library->config = *config;
    library->note(concat("init ", rank, " of ", size));
    *communicator = reinterpret_cast<Functions::Communicator>(library);
    return library->initResult;
  };
  functions.commGetAsyncError = [](Functions::Communicator, int* state) {
    *state = library->state;
    return Functions::kSuccess;
  };
  functions.commFinalize = [](Functions::Communicator) {
    library->note("finalize");
    return Functions::kInProgress;
  };
  functions.commDestroy = [](Functions::Communicator) {
    library->note("destroy");
    return Functions::kSuccess;
  };
  functions.commAbort = [](Functions::Communicator) {
    while (library->hasGraphs) {
      std::this_thread::yield();
    }
    ++library->aborts;
    return Functions::kSuccess;
  };
  functions.groupStart = [] {
    library->note("start");
    return Functions::kSuccess;
  };
  functions.groupEnd = [] {
    library->note("end");
    return Functions::kInProgress;
  };
  functions.send = [](const void*,
                      size_t count,
                      int type,
                      int peer,
                      Functions::Communicator,
                      Device::Stream) {
    library->note(concat("send ", count, " of ", type, " to ", peer));
    return library->failSend;
  };
  functions.receive = [](void*,
                         size_t count,
                         int type,
                         int peer,
                         Functions::Communicator,
                         Device::Stream) {
    library->note(concat("receive ", count, " of ", type, " from ", peer));
    return Functions::kSuccess;
  };
  functions.getErrorString = [](int) { return "remote error"; };
  functions.getLastError = [](Functions::Communicator) { return "peer 1"; };
  return functions;
}

class Nccl : public testing::Test {
 protected:
  Nccl() { library = &library_; }
  ~Nccl() override { library = nullptr; }

  std::unique_ptr<NcclNetwork> make(
      const NcclNetwork::Terms& terms = {.timeout = milliseconds(5000)}) {
    return std::make_unique<NcclNetwork>(
        makeFunctions(),
        makeNcclId(makeFunctions()),
        NcclNetwork::Place{1, 3},
        terms);
  }

  template <typename Action>
  std::string errorOf(const Action& action) {
    try {
      action();
    } catch (const DeviceError& error) {
      return error.what();
    }
    return "no error";
  }

  Library library_;
};

void exchangeOne(NcclNetwork& network) {
  std::byte byte = {};
  const NcclNetwork::Send send = {0, &byte, 1};
  network.exchange(nullptr, {&send, 1}, {});
}

TEST_F(Nccl, MakesANonblockingCommunicatorAndEndsItInOrder) {
  make().reset();
  EXPECT_EQ(
      library_.take(),
      (std::vector<std::string>{"init 1 of 3", "finalize", "destroy"}));
  EXPECT_EQ(library_.config.blocking, 0);
  EXPECT_EQ(library_.config.size, 24U);
  EXPECT_EQ(library_.config.magic, 0xcafebeefU);
  EXPECT_EQ(library_.id.bytes[127], 'i');
  EXPECT_EQ(library_.aborts, 0);
}

TEST_F(Nccl, ALimitOfBlocksIsToldInTheLayoutThatHasIt) {
  make()->abort();
  EXPECT_EQ(library_.config.version, 21400U);
  make({.timeout = milliseconds(5000), .maxCtas = 4})->abort();
  const Functions::Config& config = library_.config;
  EXPECT_EQ(config.size, sizeof(config));
  EXPECT_EQ(config.version, 21700U);
  EXPECT_EQ(config.maxCtas, 4);
  EXPECT_EQ(config.minCtas, INT_MIN);
  EXPECT_EQ(
      reinterpret_cast<const char*>(&config.maxCtas) -
          reinterpret_cast<const char*>(&config),
      28);
}

TEST_F(Nccl, ExchangeIsOneGroupWithoutEmptyTransfers) {
  const auto network = make();
  library_.take();
  std::byte bytes[8] = {};
  const std::vector<NcclNetwork::Send> sends = {
      {0, bytes, 5}, {1, bytes, 0}, {2, bytes, 3}};
  const std::vector<NcclNetwork::Receive> receives = {
      {0, bytes, 0}, {2, bytes, 7}};
  network->exchange(nullptr, sends, receives);
  EXPECT_EQ(
      library_.take(),
      (std::vector<std::string>{
          "start",
          "send 5 of 0 to 0",
          "send 3 of 0 to 2",
          "receive 7 of 0 from 2",
          "end"}));
  EXPECT_EQ(network->failure(), "");
}

TEST_F(Nccl, AFailedCallEndsTheGroupAndIsTold) {
  auto network = make();
  library_.take();
  library_.failSend = kRemoteError;
  const std::string text =
      "ncclSend failed: remote error (peer 1); NCCL_DEBUG=INFO has NCCL say "
      "more";
  EXPECT_EQ(errorOf([&] { exchangeOne(*network); }), text);
  EXPECT_EQ(library_.take().back(), "end");
  EXPECT_EQ(network->failure(), text);
  library_.failSend = Functions::kSuccess;
  EXPECT_EQ(errorOf([&] { exchangeOne(*network); }), text);
  EXPECT_TRUE(library_.take().empty()) << "nothing is called after a failure";
  network.reset();
  EXPECT_EQ(library_.aborts, 1);
}

TEST_F(Nccl, AnErrorThatComesLaterIsFound) {
  const auto network = make();
  library_.state = kRemoteError;
  EXPECT_EQ(
      network->failure(),
      "an exchange failed: remote error (peer 1); NCCL_DEBUG=INFO has NCCL "
      "say more");
}

TEST_F(Nccl, AFailedStartLeavesNoCommunicator) {
  library_.initResult = kRemoteError;
  EXPECT_EQ(
      errorOf([&] { make(); }).rfind("ncclCommInitRankConfig failed", 0), 0U);
  EXPECT_EQ(library_.aborts, 1);
}

TEST_F(Nccl, WaitsForPeersNoLongerThanItsTimeout) {
  library_.state = Functions::kInProgress;
  EXPECT_EQ(
      errorOf([&] { make({.timeout = milliseconds(20)}); }),
      "ncclCommInitRankConfig of rank 1 waits for its peers for more than 20 "
      "ms; see whether all 3 ranks make the same calls and can reach each "
      "other");
  EXPECT_EQ(library_.aborts, 1);
}

TEST_F(Nccl, StopsWaitingForPeersThatWillNotCome) {
  library_.state = Functions::kInProgress;
  NcclNetwork::Terms terms;
  terms.timeout = milliseconds(60000);
  int asked = 0;
  terms.givenUp = [&asked] { return ++asked == 3; };
  EXPECT_EQ(
      errorOf([&] { make(terms); }),
      "ncclCommInitRankConfig was given up, because another rank failed");
  EXPECT_EQ(asked, 3);
  EXPECT_EQ(library_.aborts, 1);
}

TEST_F(Nccl, AbortEndsAnExchangeThatWaits) {
  auto network = make({.timeout = milliseconds(60000)});
  library_.take();
  library_.state = Functions::kInProgress;
  auto waiting = std::async(std::launch::async, [&] {
    return errorOf([&] { exchangeOne(*network); });
  });
  while (library_.take().empty()) {
    std::this_thread::yield();
  }
  network->abort();
  network->abort();
  const std::string text =
      "the NCCL communicator of rank 1 of 3 was aborted, because its group has "
      "failed";
  EXPECT_EQ(waiting.get(), text);
  EXPECT_EQ(network->failure(), text);
  network.reset();
  EXPECT_EQ(library_.aborts, 1);
}

TEST_F(Nccl, NobodyWaitsForTheEndOfGraphs) {
  for (const bool failed : {false, true}) {
    auto network = make();
    network->keepForGraphs();
    library_.hasGraphs = true;
    library_.aborts = 0;
    library_.take();
    if (failed) {
      network->abort();
    }
    network.reset();
    EXPECT_EQ(library_.aborts, 0);
    EXPECT_EQ(library_.take(), std::vector<std::string>());
    library_.hasGraphs = false;
    const auto limit = std::chrono::steady_clock::now() + milliseconds(30000);
    while (library_.aborts == 0 && std::chrono::steady_clock::now() < limit) {
      std::this_thread::yield();
    }
    EXPECT_EQ(library_.aborts, 1);
  }
}

TEST(NcclLibrary, ThatLacksOrIsAnotherOneIsAReason) {
  const NcclLibrary none = openNccl("libautomoe_no_such.so.2");
  EXPECT_EQ(none.version, 0);
  EXPECT_NE(none.reason.find("libautomoe_no_such.so.2"), std::string::npos);
  const NcclLibrary other = openNccl("libc.so.6");
  EXPECT_EQ(other.version, 0);
  EXPECT_NE(other.reason.find("it has no ncclGetVersion"), std::string::npos)
      << other.reason;
}

TEST(NcclLibrary, VersionsAreWrittenAsNcclDoes) {
  EXPECT_EQ(ncclVersionText(23007), "2.30.7");
  EXPECT_EQ(ncclVersionText(21405), "2.14.5");
}

}  // namespace
}  // namespace automoe
