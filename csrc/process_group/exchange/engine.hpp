// SPDX-License-Identifier: Apache-2.0
// One per process: what drives every group, and sleeps when nothing is to do.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "process_group/common/config.hpp"
#include "process_group/exchange/group_table.hpp"
#include "process_group/exchange/peer_table.hpp"
#include "process_group/exchange/transfers.hpp"
#include "process_group/memory/node_memory.hpp"
#include "process_group/network/network.hpp"

namespace automoe {

struct EngineCounters {
  NetworkCounters network;
  uint64_t waitMicros = 0;  // spent in wait()
  size_t nodeMemoryBytes = 0;
};

/// Whoever waits for an operation drives the engine; a thread of its own does
/// while nobody waits, so that operations end without a wait() and packets
/// for node-mates are relayed whatever user threads do. The thread never runs
/// code of the caller beyond OperationCallbacks and knows nothing of Python.
class Engine : private NetworkListener {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Engine(Config config);
  ~Engine() override;
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  uint64_t process() const { return process_; }
  const Config& config() const { return config_; }
  const std::string& memoryAddress() const { return memory_.address(); }

  /// Drives until the operation has ended or `until` has passed; true when it
  /// has ended. Does not throw the operation's error.
  bool wait(const Operation& operation, Clock::time_point until);
  /// What an unfinished operation waits for, in words.
  std::string waitsFor(const Operation& operation);
  EngineCounters counters();
  /// How node-mates copy, in words.
  std::string describeCopies() const { return memory_.copyRates().describe(); }
  /// The network in words; empty while there is none.
  std::string describeNetwork();
  /// Leaves every group, serves node-mates until they have left too or the
  /// deadline passes, closes connections, ends the thread. Idempotent.
  void shutdown(std::chrono::milliseconds timeout);
  /// After fork(), in the child, where neither the thread nor a consistent
  /// state exists: every later use throws, and every farewell does nothing.
  void markForked() { forked_.store(true); }
  bool forked() const { return forked_.load(); }

  // For discovery.

  /// True when that process is on this node: both have mapped the other's
  /// memory. Blocks for the other's engine at most until `deadline`.
  bool meet(
      uint64_t process, const std::string& address, Clock::time_point deadline);
  /// Waits until that process has met us; false at the deadline.
  bool awaitMate(uint64_t process, Clock::time_point deadline);
  /// Creates the network at the first call.
  std::string networkAddress();
  Peer* addPeer(
      uint64_t process,
      const std::string& host,
      int64_t pid,
      const std::string& networkAddress);
  std::shared_ptr<Group> addGroup(Membership membership);

  // For the exchange.

  std::mutex& mutex() { return mutex_; }
  /// Throws in a forked child; does not need the lock.
  void checkForked() const;
  /// Throws in a forked child and after shutdown().
  void checkUsable() const;
  NodeMemory& memory() { return memory_; }
  Network& network();
  Transfers& transfers() { return transfers_; }
  /// How many operations have to be asked, more often than others, whether
  /// something has happened of which the engine is not told.
  void addPolling(int change) { polling_ += change; }
  /// After new work was posted: moves what can move now, and makes sure that
  /// a sleeping driver sees the rest.
  void kick();

 private:
  using Lock = std::unique_lock<std::mutex>;

  void threadMain();
  /// Runs a step; an error of no single message or peer fails every group.
  template <typename Step>
  bool guarded(const Step& step);
  bool progress();
  bool moveEverything();
  bool drainMailboxes();
  bool drain(Mate& mate);
  void rest(Lock& lock, Clock::time_point until);
  void sleep(Lock& lock, Clock::time_point until);
  std::chrono::milliseconds sleepAtMost(Clock::time_point until) const;
  void handleEvent(int fd);
  void mateGone(Mate& mate, const std::string& cause);
  void addMate(std::unique_ptr<Mate> mate);
  void watch(int fd);
  void housekeeping();
  void checkSuspects(Clock::time_point now);
  void failPeer(uint64_t process, const std::string& cause);
  void messageArrived(
      std::span<const std::byte> header,
      std::span<const std::byte> payload) override;
  void processUnreachable(uint64_t process, const std::string& cause) override;

  const Config config_;
  const uint64_t process_;
  std::mutex mutex_;
  std::mutex meetMutex_;  // one handshake at a time; never held with mutex_
  NodeMemory memory_;
  std::unique_ptr<Network> network_;
  Transfers transfers_;
  FileDescriptor epoll_;
  PeerTable peers_;
  GroupTable groups_;

  struct Suspect {
    uint64_t process;
    std::string cause;
    Clock::time_point since;
  };
  std::vector<Suspect> suspects_;

  // Who drives; see engine.cpp.
  std::condition_variable driverFree_;
  std::condition_variable threadWake_;
  bool driving_ = false;
  bool asleep_ = false;
  int waiters_ = 0;
  int polling_ = 0;
  uint64_t waits_ = 0;
  bool threadParked_ = false;
  Clock::time_point lastWait_;
  Clock::time_point lastHousekeeping_;
  EngineCounters counters_;

  bool stop_ = false;
  bool shutDown_ = false;
  std::atomic<bool> forked_{false};
  std::thread thread_;
};

}  // namespace automoe
