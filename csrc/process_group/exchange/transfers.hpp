// SPDX-License-Identifier: Apache-2.0
// The bulk that is on its way, in portions, so that nothing else waits long.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "process_group/exchange/operation.hpp"
#include "process_group/exchange/record.hpp"
#include "process_group/memory/node_memory.hpp"
#include "process_group/network/network.hpp"

namespace automoe {

/// A block for one rank of another node; it leaves in eager chunks.
struct DirectSend {
  std::shared_ptr<Operation> operation;
  uint64_t process = 0;
  Record record;  // of a chunk; offset and bytes are filled in
  const std::byte* data = nullptr;
  uint64_t bytes = 0;
  /// Instead of `data`: makes the next chunk, of about `room` bytes, and what
  /// its record says beside the bytes. False: nothing to send yet.
  std::function<bool(Record& record, size_t room, std::string& chunk)> next;
  /// Older operations first, then the rotated order of the nodes.
  std::pair<uint64_t, int> order;
  std::function<void()> done;  // every byte has left
};

/// A block that lies in the tensor of a node-mate.
struct MateRead {
  std::shared_ptr<Operation> operation;
  Mate* mate = nullptr;
  uint64_t address = 0;
  std::byte* to = nullptr;
  uint64_t bytes = 0;
  uint64_t failures = 0;  // of the mate when it posted
  /// Not `certain` when a group of the mate has failed since it posted: if it
  /// is this one, the tensor may have gone, and what was read be anything.
  std::function<void(bool certain)> done;
  /// The same for a read that the kernel refused.
  std::function<void(bool certain, const std::string& cause)> failed;
};

/// A block for node-mates, all of it for each of them, through node memory.
struct StagedSend {
  std::shared_ptr<Operation> operation;
  std::vector<Mate*> mates;
  Record record;  // of kind kStaged
  const std::byte* data = nullptr;
  uint64_t bytes = 0;
  /// Instead of `data`: writes the next chunk, of at most `room` bytes, and
  /// what its record says beside the bytes; returns its bytes.
  std::function<size_t(Record& record, size_t room, std::byte* to)> next;
  size_t slotBytes = 128 * 1024;  // of node memory for a chunk
  size_t largestChunk = 0;        // room that `next` needs at least
  std::function<void()> done;     // every byte has been copied
};

/// Guarded by the engine's lock. All jobs of a finished operation are dropped.
class Transfers {
 public:
  Transfers(NodeMemory& memory, size_t eagerBytes)
      : memory_(memory), chunkBytes_(eagerBytes) {}

  void setNetwork(Network* network) { network_ = network; }
  void add(DirectSend job);
  void add(MateRead job);
  void add(StagedSend job);

  /// Moves a portion of each kind; true when anything moved.
  bool advance();
  /// True when advance() would find something to copy.
  bool copiesPending() const { return !reads_.empty(); }

 private:
  struct Direct : DirectSend {
    uint64_t sent = 0;  // bytes handed to the network
    int underWay = 0;   // chunks
  };
  struct Staged : StagedSend {
    uint64_t staged = 0;
    std::vector<NodeMemory::Extent> slots;
  };

  bool advanceDirects();
  bool advanceReads();
  bool advanceStaged();
  bool sendChunk(const std::shared_ptr<Direct>& job);
  bool fillSlots(Staged& job);

  NodeMemory& memory_;
  Network* network_ = nullptr;
  const size_t chunkBytes_;
  std::list<std::shared_ptr<Direct>> directs_;  // by order
  std::list<MateRead> reads_;
  std::list<Staged> staged_;
};

}  // namespace automoe
