// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/multicast.hpp"

#include <algorithm>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {
namespace {

// All node-mates have read a slot before it is filled anew. Where ranks
// outnumber cores each of them waits for its turn, so there is more in it than
// for one.
constexpr size_t kSlotBytes = 1024 * 1024;

}  // namespace

Multicast::Multicast(Group& group, uint64_t sequence, OperationKind kind)
    : Collective(group, sequence, kind),
      sources_(static_cast<size_t>(group.topology().size())),
      casts_(static_cast<size_t>(group.topology().numNodes())) {
  const Topology& topology = group.topology();
  for (int node = 0; node < topology.numNodes(); ++node) {
    cast(node).unposted = static_cast<int>(topology.ranksOf(node).size());
  }
  cast(topology.node()).unposted -= 1;  // this rank itself
}

// ---- the own casts ----

Record Multicast::postedRecord(int destination, int node) const {
  Record record = makeRecord(RecordKind::kPosted, destination);
  describe(record);
  record.sendBytes = castBytes(node);
  record.carrier = record.sendBytes == 0 ? Carrier::kNone : Carrier::kLater;
  return record;
}

void Multicast::postCasts(Clock::time_point deadline, uint64_t ownSteps) {
  const Topology& topology = group_.topology();
  openSteps(deadline);
  for (int rank = 0; rank < topology.size(); ++rank) {
    if (source(rank).posted && !agrees(rank)) {
      return;  // nothing is sent
    }
  }
  addSteps(static_cast<uint64_t>(topology.size() - 1) + ownSteps);
  for (int i = 1; i < topology.numNodes(); ++i) {
    postToNode((topology.node() + i) % topology.numNodes());
  }
  postToMates();
  for (int rank = 0; rank < topology.size() && !finished(); ++rank) {
    if (source(rank).posted) {
      takePosted(rank, std::as_bytes(std::span(source(rank).kept)));
      source(rank).kept.clear();
    }
  }
  for (int node = 0; node < topology.numNodes() && !finished(); ++node) {
    if (cast(node).unposted == 0) {
      nodeHasPosted(node);
    }
  }
  if (!finished()) {
    stepDone();
  }
}

void Multicast::postToNode(int node) {
  const int railPeer = group_.topology().railPeer(node);
  Record record = postedRecord(railPeer, node);
  GroupCounters& counters = group_.mutableCounters();
  counters.networkPayloadBytes += record.sendBytes;
  std::string payload;
  Cast& it = cast(node);
  if (record.sendBytes > 0) {
    if (group_.peer(railPeer).budget.tryRide(record.sendBytes)) {
      it.unmatched = record.sendBytes;
      Record chunk;
      payload.resize(nextChunk(node, 0, record.sendBytes, chunk));
      fill(node, chunk, reinterpret_cast<std::byte*>(payload.data()));
      record.carrier = Carrier::kInline;
      record.rows = chunk.rows;
      counters.packets += 1;
    } else {
      it.waits = true;
      addSteps(1);
      counters.castsStreamed += 1;
    }
  }
  sendRecord(railPeer, record, std::move(payload));
}

void Multicast::postToMates() {
  const Topology& topology = group_.topology();
  const int node = topology.node();
  if (topology.localSize() == 1) {
    return;
  }
  Record record = postedRecord(topology.rank(), node);
  if (record.sendBytes > 0 && rideToMates(record)) {
    return;
  }
  if (record.sendBytes > 0) {
    cast(node).waits = true;
    addSteps(1);
  }
  for (int rank : topology.ranksOf(node)) {
    if (rank != topology.rank()) {
      record.destination = rank;
      group_.peer(rank).mate->post(asBytes(record));
    }
  }
}

bool Multicast::rideToMates(Record record) {
  const Topology& topology = group_.topology();
  const auto ranks = topology.ranksOf(topology.node());
  const uint64_t bytes = record.sendBytes;
  std::vector<UnmatchedBudget*> taken;
  for (int rank : ranks) {
    if (rank == topology.rank()) {
      continue;
    }
    UnmatchedBudget& budget = group_.peer(rank).budget;
    if (!budget.tryRide(bytes)) {
      break;
    }
    taken.push_back(&budget);
  }
  std::optional<NodeMemory::Extent> extent;
  if (taken.size() + 1 == ranks.size()) {
    extent = group_.engine().memory().allocate(
        bytes, static_cast<uint32_t>(taken.size()));
  }
  if (!extent.has_value()) {
    for (UnmatchedBudget* budget : taken) {
      budget->matched(bytes);
    }
    return false;
  }
  Record chunk;
  AUTOMOE_CHECK(
      nextChunk(topology.node(), 0, bytes, chunk) == bytes,
      "a cast that rides is one chunk");
  fill(topology.node(), chunk, extent->data);
  cast(topology.node()).unmatched = bytes;
  record.carrier = Carrier::kExtent;
  record.owner = topology.rank();
  record.place = extent->offset;
  record.bytes = bytes;
  record.rows = chunk.rows;
  for (int rank : ranks) {
    if (rank != topology.rank()) {
      record.destination = rank;
      group_.peer(rank).mate->post(asBytes(record));
    }
  }
  return true;
}

void Multicast::nodeHasPosted(int node) {
  const Topology& topology = group_.topology();
  Cast& it = cast(node);
  if (it.unmatched > 0) {
    const bool own = node == topology.node();
    for (int rank : topology.ranksOf(node)) {
      if (own ? rank != topology.rank() : rank == topology.railPeer(node)) {
        group_.peer(rank).budget.matched(it.unmatched);
      }
    }
    it.unmatched = 0;
  }
  if (!it.waits || !posted()) {
    return;
  }
  it.waits = false;
  if (node == topology.node()) {
    streamToMates();
  } else {
    streamToNode(node);
  }
}

void Multicast::streamToNode(int node) {
  DirectSend job = directSend(group_.topology().railPeer(node));
  job.record.kind = RecordKind::kCast;
  job.record.carrier = Carrier::kInline;
  job.bytes = castBytes(node);
  job.next = [this, node](Record& chunk, size_t room, std::string& to) {
    Cast& it = cast(node);
    to.resize(nextChunk(node, it.nextRow, room, chunk));
    fill(node, chunk, reinterpret_cast<std::byte*>(to.data()));
    it.nextRow += chunk.rows;
    return true;
  };
  group_.engine().transfers().add(std::move(job));
}

void Multicast::streamToMates() {
  const Topology& topology = group_.topology();
  const int node = topology.node();
  StagedSend job;
  job.operation = shared_from_this();
  for (int rank : topology.ranksOf(node)) {
    if (rank != topology.rank()) {
      job.mates.push_back(group_.peer(rank).mate);
    }
  }
  job.record = makeRecord(RecordKind::kStaged, topology.rank());
  job.record.carrier = Carrier::kExtent;
  job.record.owner = topology.rank();
  job.bytes = castBytes(node);
  job.slotBytes = kSlotBytes;
  job.largestChunk = largestRow();
  job.next = [this, node](Record& chunk, size_t room, std::byte* to) {
    Cast& it = cast(node);
    const size_t bytes = nextChunk(node, it.nextRow, room, chunk);
    fill(node, chunk, to);
    it.nextRow += chunk.rows;
    return bytes;
  };
  job.done = [this] { stepDone(); };
  group_.engine().transfers().add(std::move(job));
}

// ---- what arrives ----

void Multicast::sourcePosted(
    const Record& record, std::span<const std::byte> payload) {
  Source& state = source(record.source);
  if (state.posted) {
    throw TransportError(
        concat("rank ", record.source, " posted one operation twice"));
  }
  if ((record.carrier == Carrier::kNone) != (record.sendBytes == 0) ||
      (record.carrier == Carrier::kInline &&
       payload.size() != record.sendBytes) ||
      (record.carrier == Carrier::kExtent &&
       record.bytes != record.sendBytes) ||
      record.carrier == Carrier::kCrossMemory ||
      record.carrier > Carrier::kLater) {
    throw TransportError(concat(
        "a cast of ",
        record.sendBytes,
        " bytes by carrier ",
        static_cast<int>(record.carrier),
        " with ",
        payload.size()));
  }
  state.posted = true;
  state.record = record;
  state.held = record.carrier == Carrier::kExtent;
  const int node = group_.topology().nodeOf(record.source);
  cast(node).unposted -= 1;
  if (!posted()) {
    state.kept.assign(
        reinterpret_cast<const char*>(payload.data()), payload.size());
    return;
  }
  if (!agrees(record.source)) {
    return;
  }
  takePosted(record.source, payload);
  if (!finished() && cast(node).unposted == 0) {
    nodeHasPosted(node);
  }
}

bool Multicast::agrees(int rank) {
  const std::string text = disagreement(source(rank).record);
  if (text.empty()) {
    return true;
  }
  group_.failMismatch(title(), text);
  return false;
}

void Multicast::takePosted(int rank, std::span<const std::byte> payload) {
  Source& state = source(rank);
  Record chunk = state.record;
  chunk.offset = 0;
  switch (chunk.carrier) {
    case Carrier::kNone:
      received(rank);
      break;
    case Carrier::kInline:
      arrived(rank, chunk, payload);
      break;
    case Carrier::kExtent:
      state.held = false;
      readExtent(chunk);
      break;
    default:  // in chunks, which may have come already
      if (state.got == chunk.sendBytes) {
        received(rank);
      }
      break;
  }
}

void Multicast::castArrived(
    const Record& record, std::span<const std::byte> payload) {
  if (!posted()) {
    throw TransportError("a chunk came before its operation was posted");
  }
  if (record.carrier == Carrier::kExtent) {
    readExtent(record);
  } else {
    arrived(record.source, record, payload);
  }
}

void Multicast::readExtent(const Record& chunk) {
  try {
    arrived(chunk.source, chunk, extentOf(chunk));
  } catch (const Error&) {
    releaseExtent(chunk);
    throw;
  }
  releaseExtent(chunk);
}

void Multicast::chunkStaged(const Record& record) {
  castArrived(record, {});
}

void Multicast::arrived(
    int rank, const Record& chunk, std::span<const std::byte> bytes) {
  Source& state = source(rank);
  if (bytes.empty() ||
      (state.posted && bytes.size() > state.record.sendBytes - state.got)) {
    throw TransportError(concat(
        "a chunk of ",
        bytes.size(),
        " bytes does not fit the cast of rank ",
        rank));
  }
  state.got += bytes.size();
  try {
    take(rank, chunk, bytes);
  } catch (const InvalidArgument& error) {
    group_.failMismatch(title(), error.what());
    return;
  }
  if (state.posted && state.got == state.record.sendBytes) {
    received(rank);
  }
}

void Multicast::received(int rank) {
  if (!source(rank).received) {
    source(rank).received = true;
    stepDone();
  }
}

// ---- the end ----

void Multicast::abandon() {
  for (Source& state : sources_) {
    if (state.held) {
      state.held = false;
      releaseExtent(state.record);
    }
  }
  const Topology& topology = group_.topology();
  for (int node = 0; node < topology.numNodes(); ++node) {
    cast(node).waits = false;
    nodeHasPosted(node);  // gives the budget back
  }
}

std::string Multicast::waitsFor() const {
  std::string records;
  std::string bytes;
  for (int rank = 0; rank < group_.topology().size(); ++rank) {
    const Source& state = source(rank);
    if (rank == group_.topology().rank()) {
      continue;
    }
    if (!state.posted) {
      records += concat(records.empty() ? "" : ", ", rank);
    } else if (!state.received) {
      bytes += concat(
          bytes.empty() ? "" : ", ",
          rank,
          " (",
          state.got,
          " of ",
          state.record.sendBytes,
          " bytes)");
    }
  }
  std::string text;
  if (!records.empty()) {
    text = concat("ranks that have not posted it: ", records);
  }
  if (!bytes.empty()) {
    text += concat(text.empty() ? "" : "; ", "bytes from ranks: ", bytes);
  }
  return text.empty() ? "its sends to leave" : text;
}

}  // namespace automoe
