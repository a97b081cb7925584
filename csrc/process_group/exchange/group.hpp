// SPDX-License-Identifier: Apache-2.0
// The ranks of one process group, their operations and their failure.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "process_group/exchange/all_to_all.hpp"
#include "process_group/exchange/combine_arguments.hpp"
#include "process_group/exchange/inquiry.hpp"
#include "process_group/exchange/messages.hpp"
#include "process_group/exchange/pairs.hpp"
#include "process_group/exchange/peer_table.hpp"
#include "process_group/exchange/record.hpp"
#include "process_group/exchange/row_moves.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe {

class Engine;
class Route;
class RouteBuilder;
struct DeviceCallFacts;
struct DeviceStreams;
struct ScheduledArguments;

/// What the ranks of a new group have found out about each other.
struct Membership {
  uint64_t id = 0;
  std::string name;
  Topology topology;
  std::vector<Peer*> peers;  // by group rank; null for the own rank
  /// By group rank: its number in the whole job. Empty: the same.
  std::vector<int> globalRanks = {};
  /// See Config::mergeRows.
  bool mergeRows = true;
};

struct GroupCounters {
  uint64_t operations = 0;
  uint64_t packets = 0;         // messages to a node that carried its blocks
  uint64_t directBlocks = 0;    // blocks sent to a rank of another node
  uint64_t inlineBlocks = 0;    // blocks to mates through their mailbox
  uint64_t readBlocks = 0;      // blocks that mates read from our tensor
  uint64_t stagedBlocks = 0;    // blocks staged through node memory
  uint64_t relayedPackets = 0;  // packets received for this node
  uint64_t castsStreamed = 0;   // casts to a node that left in chunks
  uint64_t mergedCasts = 0;     // to a node, of blocks with equal rows
  uint64_t mergedBytes = 0;     // of rows that did not cross again
  uint64_t networkPayloadBytes = 0;  // bytes of blocks sent to other nodes
};

/// How a group ended, with the kind that the error has on every rank.
enum class FailureKind : uint8_t {
  kMismatch = 1,  // arguments of two ranks do not agree
  kPeer = 2,      // a rank died or left
  kTimeout = 3,
  kAborted = 4,
  kTransport = 5,
};

/// Public methods take the engine's lock unless said otherwise.
class Group {
 public:
  /// Of a failure that is told to others; names of many ranks may be longer.
  static constexpr size_t kTextBytes = 4 * 1024;

  Group(Engine& engine, Membership membership);

  const Topology& topology() const { return membership_.topology; }
  const std::string& name() const { return membership_.name; }
  uint64_t id() const { return membership_.id; }
  bool mergesRows() const { return membership_.mergeRows; }

  /// Posts an all_to_all and returns at once. Throws the failure of the group
  /// if it has one, InvalidArgument for blocks that do not fit the group.
  std::shared_ptr<Operation> allToAll(
      AllToAllArguments arguments,
      std::chrono::milliseconds timeout,
      OperationCallbacks callbacks);
  /// The same for the lists of a plan. The builder is complete when the
  /// operation has succeeded, and must not be used before.
  std::shared_ptr<Operation> plan(
      std::shared_ptr<RouteBuilder> builder,
      std::chrono::milliseconds timeout,
      OperationCallbacks callbacks);
  /// The same for rows to their experts, and back. InvalidArgument for a
  /// route of another group.
  std::shared_ptr<Operation> dispatch(
      DispatchArguments arguments,
      std::chrono::milliseconds timeout,
      OperationCallbacks callbacks);
  std::shared_ptr<Operation> combine(
      CombineArguments arguments,
      std::chrono::milliseconds timeout,
      OperationCallbacks callbacks);
  /// The same for the host's side of a call on a device: one of those
  /// whose kinds begin with kDevice.
  std::shared_ptr<Operation> deviceCall(
      OperationKind kind,
      const DeviceCallFacts& facts,
      DeviceStreams streams,
      std::chrono::milliseconds timeout,
      OperationCallbacks callbacks);
  /// The same for a collective that follows a schedule.
  std::shared_ptr<Operation> collective(
      ScheduledArguments arguments,
      std::chrono::milliseconds timeout,
      OperationCallbacks callbacks);
  /// The same for one message to or from another rank; these have no number
  /// among the collectives. InvalidArgument for a rank that is not another.
  std::shared_ptr<PairOperation> send(
      const PairArguments& arguments,
      std::chrono::milliseconds timeout,
      OperationCallbacks callbacks);
  std::shared_ptr<PairOperation> receive(
      const PairArguments& arguments,
      std::chrono::milliseconds timeout,
      OperationCallbacks callbacks);
  /// Throws InvalidArgument for a route of another group. Takes no lock.
  void checkRoute(const Route& route) const;
  /// Instead of the next collective, because of an argument that only this rank
  /// can check. Where others post it, every rank fails with this text; where
  /// all refuse it too, nothing has happened.
  void refuse(const std::string& text);
  /// Waits for the posted operations up to `timeout` (then they fail), says
  /// goodbye, and leaves. The engine goes on relaying for node-mates until
  /// they have left too. Idempotent.
  void leave(std::chrono::milliseconds timeout);
  /// Fails every operation now, here and at the other ranks.
  void abort(const std::string& reason);
  /// The same because somebody did not come (in time); says who.
  void giveUp(
      const std::string& text, FailureKind kind = FailureKind::kTimeout);
  /// Null while the group works.
  std::exception_ptr failure();
  /// Calls `hook` once, with the engine's lock held, when the group fails; at
  /// once if it has. It must neither block nor throw. There is one hook: an
  /// empty one takes its place, and none runs after that has returned.
  void onFailure(std::function<void()> hook);
  GroupCounters counters();

  // For the exchange, with the engine's lock held.

  Engine& engine() { return engine_; }
  Peer& peer(int rank) { return *membership_.peers[static_cast<size_t>(rank)]; }
  /// Throws TransportError for a rank that is not on this node (the number
  /// may come from a peer).
  Mate& mate(int rank);
  GroupCounters& mutableCounters() { return counters_; }
  Messages& messages() { return messages_; }
  /// A record without a payload to one other rank.
  void tell(int rank, const Record& record);
  /// What a collective was that ends or has ended: a message of another rank
  /// may still come and show that its call was another.
  void remember(uint64_t sequence, const MessageDescription& description);
  Record makeRecord(RecordKind kind, uint64_t sequence, int destination) const;
  /// A message for this group. `fromMate` is null when it came by network.
  void handle(
      const Record& record,
      std::span<const std::byte> payload,
      const Mate* fromMate);
  void fail(FailureKind kind, const std::string& text, bool tellOthers = true);
  /// Ranks do not agree on the arguments of a call, such as "gather number 7".
  void failMismatch(const std::string& title, const std::string& text);
  void peerGone(const Peer& peer, const std::string& cause);
  void checkDeadlines(Operation::Clock::time_point now);
  void operationEnded(uint64_t sequence);
  bool busy() const { return !operations_.empty() || !pairs_.empty(); }
  /// True once nobody needs this rank in the group any more.
  bool over() const;
  bool failed() const { return failure_ != nullptr; }

 private:
  using Start =
      std::function<void(Collective&, Operation::Clock::time_point deadline)>;

  void checkOpen();
  std::shared_ptr<PairOperation> postPair(
      bool sends,
      const PairArguments& arguments,
      std::chrono::milliseconds timeout,
      OperationCallbacks callbacks);
  std::shared_ptr<Operation> post(
      OperationKind kind,
      std::chrono::milliseconds timeout,
      OperationCallbacks callbacks,
      const Start& start);
  /// The operation of that number, made if need be. Null, and the group
  /// failed, when `rank` calls another collective than the others.
  std::shared_ptr<Collective> operation(
      uint64_t sequence, OperationKind kind, int rank);
  struct Call {
    int rank;
    OperationKind kind;
  };
  void failKinds(uint64_t sequence, Call low, Call high);
  std::shared_ptr<Collective> make(
      uint64_t sequence, OperationKind kind, int rank);
  void handleLate(
      const Record& record, std::span<const std::byte> payload, bool byNetwork);
  bool handleMessage(const Record& record, std::span<const std::byte> payload);
  void handleCollective(
      const Record& record, std::span<const std::byte> payload, bool byNetwork);
  /// Gives back node memory of a record that comes after the failure.
  void releaseUnread(const Record& record, bool byNetwork);
  void handlePacket(
      Collective& to, const Record& record, std::span<const std::byte> payload);
  void handleCast(
      Collective& to, const Record& record, std::span<const std::byte> payload);
  std::vector<Mate*> mates() const;
  void handleFailed(
      const Record& record, std::span<const std::byte> payload, bool byNetwork);
  void handleRefused(
      const Record& record, std::span<const std::byte> payload, bool byNetwork);
  void failRefused(uint64_t sequence);
  void handleLeaving(const Record& record, bool byNetwork);
  void tellMates(const Record& record, std::span<const std::byte> payload);
  void tellNodes(const Record& record, std::span<const std::byte> payload);
  void checkPairs(Operation::Clock::time_point now);
  /// True when it is time to fail; `text` then says what others have answered.
  bool inquire(
      const Collective& late,
      Operation::Clock::time_point now,
      std::string& text);
  void handleAsk(const Record& record);
  /// Whether the own call of that number is still known; fails the group if it
  /// is another than the record is of.
  bool compareCalls(const Record& record);
  std::exception_ptr makeError(const std::string& waitedFor) const;

  Engine& engine_;
  const Membership membership_;
  uint64_t nextSequence_ = 0;
  std::map<uint64_t, std::shared_ptr<Collective>> operations_;
  /// By number: what another rank has refused that this one may still post,
  /// and what this one has.
  std::map<uint64_t, std::string> refusedByOthers_;
  std::set<uint64_t> refused_;
  std::vector<bool> left_;
  std::vector<uint64_t> leftAt_;  // first operation it will not post
  std::vector<Operation::Clock::time_point> leftSince_;
  Messages messages_;
  PairTable pairs_;
  uint64_t pairNumber_ = 0;
  /// Of the latest collectives, by number modulo the size.
  static constexpr uint64_t kNoCall = ~uint64_t{0};
  std::vector<std::pair<uint64_t, MessageDescription>> recent_;
  bool leaving_ = false;
  std::map<uint64_t, Inquiry> inquiries_;  // by number of the collective
  std::exception_ptr failure_;
  FailureKind failureKind_ = FailureKind::kTransport;
  std::string failureText_;
  GroupCounters counters_;
  std::function<void()> failureHook_;
};

}  // namespace automoe
