// SPDX-License-Identifier: Apache-2.0
// all_to_all of byte blocks as a state machine on the engine.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "process_group/exchange/operation.hpp"
#include "process_group/exchange/record.hpp"

namespace automoe {

class Group;

/// One block to and one from every rank of the group, in rank order. The
/// memory must stay until OperationCallbacks::released.
struct AllToAllArguments {
  struct Block {
    std::byte* data;
    uint64_t bytes;
  };
  std::vector<Block> sends;     // only read
  std::vector<Block> receives;  // only written
  uint8_t dtype = 0;            // must agree between sender and receiver
  uint32_t elementBytes = 1;
  /// Names a dtype in error texts.
  const char* (*dtypeName)(uint8_t) = nullptr;
};

/// Exists from the first record of any rank or from the call, whichever comes
/// first. Steps and bytes: one record to each node-mate and one packet to each
/// other node; every byte is copied once into its output (twice where it rides
/// inside a packet: into node memory first).
class AllToAll final : public Operation,
                       public std::enable_shared_from_this<AllToAll> {
 public:
  AllToAll(Group& group, uint64_t sequence);
  ~AllToAll() override;

  /// This rank's own call. The block to itself has been copied already.
  void post(AllToAllArguments arguments, Clock::time_point deadline);
  bool posted() const { return posted_; }
  /// A kPosted record for this rank. `payload` holds what the carrier says.
  void sourcePosted(const Record& record, std::span<const std::byte> payload);
  bool hasPosted(int source) const {
    return sources_[static_cast<size_t>(source)].posted;
  }
  void chunkArrived(const Record& record, std::span<const std::byte> payload);
  void chunkStaged(const Record& record);
  void blockRead(const Record& record);
  void readConfirmed(const Record& record);
  /// Gives back what it holds of others, when the group has failed.
  void abandon();

  std::string waitsFor() const override;

 private:
  /// What is known of one other rank, as a source and as a destination.
  struct Source {
    bool posted = false;
    bool received = false;        // its block is in the output
    bool waitsForMatch = false;   // our block leaves when its record is here
    bool unconfirmed = false;     // read, but a group of its rank has failed
    std::string readError;        // why that read was refused
    bool reads = false;           // it reads our block and will say so
    Record record;                // its kPosted, when posted
    std::string kept;             // an inline payload that came before our call
    uint64_t got = 0;             // bytes of chunks
    bool ridesUnmatched = false;  // counted in its node's NodeRide
    size_t rode = 0;              // bytes of ours that rode to it unmatched
  };
  /// Bytes that rode to one other node, until its ranks have posted.
  struct NodeRide {
    size_t bytes = 0;
    int unmatchedRanks = 0;
  };

  Source& source(int rank) { return sources_[static_cast<size_t>(rank)]; }
  Record postedRecord(int destination) const;
  void postToMate(int destination);
  void postToNode(int node);
  void ridesMatched(int source);
  void settle(int source);
  void take(int source, std::span<const std::byte> payload);
  void sendMatched(int destination);
  void received(int source);
  void askToConfirm(int source, const std::string& readError);
  void releaseExtent(const Record& record);
  void stepDone();
  bool sizesAgree(int source);

  Group& group_;
  bool posted_ = false;
  AllToAllArguments arguments_;
  std::vector<Source> sources_;
  std::vector<NodeRide> rides_;
  /// Blocks not received, blocks not sent, messages that have not left.
  uint64_t pending_ = 0;
};

}  // namespace automoe
