// SPDX-License-Identifier: Apache-2.0
// all_to_all of byte blocks as a state machine on the engine.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "process_group/exchange/collective.hpp"
#include "process_group/exchange/unique_rows.hpp"

namespace automoe {

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
  /// Of what may be the same in several blocks; 0: no rows.
  uint64_t rowBytes = 0;
  const char* (*dtypeName)(uint8_t) = nullptr;
};

/// Steps and bytes: one record to each node-mate and one packet to each
/// other node; every byte is copied once into its output (twice where it rides
/// inside a packet: into node memory first).
class AllToAll final : public Collective {
 public:
  AllToAll(Group& group, uint64_t sequence);
  ~AllToAll() override;

  /// This rank's own call. The block to itself has been copied already.
  void post(AllToAllArguments arguments, Clock::time_point deadline);

  bool hasPosted(int source) const override {
    return sources_[static_cast<size_t>(source)].posted;
  }
  void sourcePosted(
      const Record& record, std::span<const std::byte> payload) override;
  void chunkArrived(
      const Record& record, std::span<const std::byte> payload) override;
  void chunkStaged(const Record& record) override;
  void castArrived(
      const Record& record, std::span<const std::byte> payload) override;
  void blockRead(const Record& record) override;
  void readConfirmed(const Record& record) override;
  void abandon() override;

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
  /// What goes to one other node as one: bytes that rode with the record, or
  /// large blocks whose equal rows are merged, once its ranks have posted.
  struct NodeRide {
    size_t bytes = 0;
    int unmatchedRanks = 0;
    bool large = false;
    std::optional<UniqueRows> merged;
    size_t nextChunk = 0;
  };

  Source& source(int rank) { return sources_[static_cast<size_t>(rank)]; }
  Record postedRecord(int destination) const;
  void postToMate(int destination);
  void postToNode(int node);
  void ridesMatched(int source);
  void mergeRows(int node);
  void sendMerged(int node);
  void takeMerged(const Record& record, std::span<const std::byte> chunk);
  void settle(int source);
  void take(int source, std::span<const std::byte> payload);
  void sendMatched(int destination);
  void received(int source);
  void askToConfirm(int source, const std::string& readError);
  bool sizesAgree(int source);

  AllToAllArguments arguments_;
  std::vector<Source> sources_;
  std::vector<NodeRide> rides_;
};

}  // namespace automoe
