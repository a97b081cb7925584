// SPDX-License-Identifier: Apache-2.0
// What every collective of a group has in common.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "process_group/exchange/operation.hpp"
#include "process_group/exchange/record.hpp"
#include "process_group/exchange/transfers.hpp"
#include "process_group/topology/topology.hpp"

namespace automoe {

class Group;

/// When a transfer to a rank of another node is due: the next node first, and
/// of its ranks the one on our rail, so that not all send to one at a time.
int rotation(const Topology& topology, int destination);

/// One collective as a state machine on the engine. Exists from the first
/// record of any rank or from the own call, whichever comes first. It ends
/// when its steps are done; each subclass counts its own.
class Collective : public Operation,
                   public std::enable_shared_from_this<Collective> {
 public:
  Collective(Group& group, uint64_t sequence, OperationKind kind);

  OperationKind operationKind() const { return kind_; }
  /// Who made it exist: this rank, or whose record came first.
  int firstRank() const { return firstRank_; }
  void setFirstRank(int rank) { firstRank_ = rank; }
  /// "dispatch number 7", for error texts.
  std::string title() const;
  /// The own call has been made.
  bool posted() const { return posted_; }
  virtual bool hasPosted(int source) const = 0;

  // What arrives, each for the own rank. A handler that finds a record out of
  // place throws TransportError.

  /// A kPosted record; `payload` holds what the carrier says.
  virtual void sourcePosted(
      const Record& record, std::span<const std::byte> payload) = 0;
  /// A kPayload record.
  virtual void chunkArrived(
      const Record& record, std::span<const std::byte> payload);
  /// A kStaged record: its bytes lie in an extent of the source, a node-mate.
  virtual void chunkStaged(const Record& record);
  /// A kCast record, with its bytes or (by kExtent) where they lie.
  virtual void castArrived(
      const Record& record, std::span<const std::byte> payload);
  virtual void blockRead(const Record& record);
  virtual void readConfirmed(const Record& record);
  /// Called every now and then.
  virtual void remind(Clock::time_point now) { (void)now; }
  /// Gives back what it holds of others, when the group has failed.
  virtual void abandon() = 0;

 protected:
  /// The own call is made: there is one step, until closeSteps().
  void openSteps(Clock::time_point deadline);
  void addSteps(uint64_t count) { steps_ += count; }
  /// Steps that will not be; not the last one.
  void takeSteps(uint64_t count) { steps_ -= count; }
  void stepDone();

  Record makeRecord(RecordKind kind, int destination) const;
  /// Sends a message to a rank of another node; a step until it has left.
  void sendRecord(int destination, Record record, std::string payload);
  /// A direct send to a rank of another node, without its data; its `done` is
  /// a step.
  DirectSend directSend(int destination);
  /// The bytes of a record that lie in an extent of a node-mate.
  std::span<const std::byte> extentOf(const Record& record) const;
  /// Gives the extent of a record back to its owner. Never throws.
  void releaseExtent(const Record& record) const;

  Group& group_;

 private:
  [[noreturn]] void unexpected(const char* what, const Record& record) const;

  const OperationKind kind_;
  int firstRank_ = 0;
  bool posted_ = false;
  uint64_t steps_ = 0;
};

}  // namespace automoe
