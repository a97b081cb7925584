// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/all_to_all.hpp"

#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/agreement.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {
namespace {

// Copied twice through a mailbox rather than read from the other process: a
// system call and an answer cost more than the second copy of so few bytes.
constexpr uint64_t kInlineBytes = 8 * 1024;

}  // namespace

AllToAll::AllToAll(Group& group, uint64_t sequence)
    : Collective(group, sequence, OperationKind::kAllToAll),
      sources_(static_cast<size_t>(group.topology().size())),
      rides_(static_cast<size_t>(group.topology().numNodes())) {}

AllToAll::~AllToAll() = default;

Record AllToAll::postedRecord(int destination) const {
  Record record = makeRecord(RecordKind::kPosted, destination);
  const auto index = static_cast<size_t>(destination);
  record.dtype = arguments_.dtype;
  record.elementBytes = arguments_.elementBytes;
  record.sendBytes = arguments_.sends[index].bytes;
  record.receiveBytes = arguments_.receives[index].bytes;
  return record;
}

void AllToAll::post(AllToAllArguments arguments, Clock::time_point deadline) {
  arguments_ = std::move(arguments);
  openSteps(deadline);
  const Topology& topology = group_.topology();
  // Nothing is sent when a record that is already here does not agree.
  for (int rank = 0; rank < topology.size(); ++rank) {
    if (source(rank).posted && !sizesAgree(rank)) {
      return;
    }
  }
  addSteps(static_cast<uint64_t>(topology.size() - 1));  // blocks to receive
  for (int rank : topology.ranksOf(topology.node())) {
    if (rank != topology.rank()) {
      postToMate(rank);
    }
  }
  for (int i = 1; i < topology.numNodes(); ++i) {
    postToNode((topology.node() + i) % topology.numNodes());
  }
  for (int node = 0; node < topology.numNodes(); ++node) {
    mergeRows(node);
  }
  for (int rank = 0; rank < topology.size() && !finished(); ++rank) {
    if (source(rank).posted) {
      settle(rank);
      take(rank, std::as_bytes(std::span(source(rank).kept)));
    }
  }
  if (!finished()) {
    stepDone();
  }
}

void AllToAll::postToMate(int destination) {
  Record record = postedRecord(destination);
  const std::byte* data =
      arguments_.sends[static_cast<size_t>(destination)].data;
  Peer& peer = group_.peer(destination);
  Source& state = source(destination);
  std::span<const std::byte> payload;
  if (record.sendBytes == 0) {
    record.carrier = Carrier::kNone;
  } else if (
      record.sendBytes <= kInlineBytes &&
      (state.posted || peer.budget.tryRide(record.sendBytes))) {
    record.carrier = Carrier::kInline;
    payload = {data, record.sendBytes};
    state.rode = state.posted ? 0 : record.sendBytes;
    group_.mutableCounters().inlineBlocks += 1;
  } else if (peer.mate->description().readsUs) {
    record.carrier = Carrier::kCrossMemory;
    record.place = reinterpret_cast<uint64_t>(data);
    state.reads = true;
    addSteps(1);
    group_.mutableCounters().readBlocks += 1;
  } else {
    record.carrier = Carrier::kLater;
    state.waitsForMatch = true;
    addSteps(1);
    group_.mutableCounters().stagedBlocks += 1;
  }
  record.bytes = payload.size();
  peer.mate->post(asBytes(record), payload);
}

void AllToAll::postToNode(int node) {
  const Topology& topology = group_.topology();
  const auto ranks = topology.ranksOf(node);
  const int railPeer = topology.railPeer(node);
  Packet packet;
  uint64_t total = 0;
  for (int rank : ranks) {
    const auto& send = arguments_.sends[static_cast<size_t>(rank)];
    const auto& receive = arguments_.receives[static_cast<size_t>(rank)];
    packet.sizes.push_back({send.bytes, receive.bytes});
    total += send.bytes;
  }
  GroupCounters& counters = group_.mutableCounters();
  counters.networkPayloadBytes += total;
  if (total > 0 && group_.peer(railPeer).budget.tryRide(total)) {
    NodeRide& ride = rides_[static_cast<size_t>(node)];
    ride.bytes = total;
    for (int rank : ranks) {
      const auto& send = arguments_.sends[static_cast<size_t>(rank)];
      packet.blocks.emplace_back(send.data, send.bytes);
      source(rank).ridesUnmatched = !source(rank).posted;
      ride.unmatchedRanks += source(rank).posted ? 0 : 1;
    }
    if (ride.unmatchedRanks == 0) {
      group_.peer(railPeer).budget.matched(total);
    }
    counters.packets += 1;
  } else {
    rides_[static_cast<size_t>(node)].large = total > 0;
    for (int rank : ranks) {
      const bool any = arguments_.sends[static_cast<size_t>(rank)].bytes > 0;
      source(rank).waitsForMatch = any;
      addSteps(any ? 1 : 0);
      counters.directBlocks += any ? 1 : 0;
    }
  }
  Record record = postedRecord(railPeer);
  sendRecord(railPeer, record, encodePacket(packet));
}

void AllToAll::sourcePosted(
    const Record& record, std::span<const std::byte> payload) {
  Source& state = source(record.source);
  if (state.posted) {
    throw TransportError(
        concat("rank ", record.source, " posted one operation twice"));
  }
  if (record.carrier > Carrier::kLater ||
      (record.carrier == Carrier::kNone) != (record.sendBytes == 0)) {
    throw TransportError(concat(
        "a block of ",
        record.sendBytes,
        " bytes by carrier ",
        static_cast<int>(record.carrier)));
  }
  state.posted = true;
  state.record = record;
  if (!posted()) {
    state.kept.assign(
        reinterpret_cast<const char*>(payload.data()), payload.size());
    return;
  }
  if (!sizesAgree(record.source)) {
    return;
  }
  settle(record.source);
  take(record.source, payload);
}

bool AllToAll::sizesAgree(int rank) {
  const auto index = static_cast<size_t>(rank);
  const Record& theirs = source(rank).record;
  const std::string text = findDisagreement(
      {.rank = rank,
       .sendBytes = theirs.sendBytes,
       .receiveBytes = theirs.receiveBytes,
       .dtype = theirs.dtype},
      {.rank = group_.topology().rank(),
       .sendBytes = arguments_.sends[index].bytes,
       .receiveBytes = arguments_.receives[index].bytes,
       .dtype = arguments_.dtype},
      arguments_.elementBytes,
      arguments_.dtypeName);
  if (text.empty()) {
    return true;
  }
  group_.failMismatch(title(), text);
  return false;
}

void AllToAll::settle(int rank) {
  Source& state = source(rank);
  if (state.rode > 0) {
    group_.peer(rank).budget.matched(state.rode);
    state.rode = 0;
  }
  ridesMatched(rank);
  if (state.waitsForMatch) {
    state.waitsForMatch = false;
    sendMatched(rank);
  }
}

void AllToAll::ridesMatched(int rank) {
  Source& state = source(rank);
  if (!state.ridesUnmatched) {
    return;
  }
  state.ridesUnmatched = false;
  const Topology& topology = group_.topology();
  const int node = topology.nodeOf(rank);
  NodeRide& ride = rides_[static_cast<size_t>(node)];
  ride.unmatchedRanks -= 1;
  if (ride.unmatchedRanks > 0) {
    return;
  }
  if (ride.merged.has_value()) {
    sendMerged(node);
  } else {
    group_.peer(topology.railPeer(node)).budget.matched(ride.bytes);
  }
}

void AllToAll::sendMatched(int destination) {
  const auto& send = arguments_.sends[static_cast<size_t>(destination)];
  const Topology& topology = group_.topology();
  Transfers& transfers = group_.engine().transfers();
  if (topology.nodeOf(destination) == topology.node()) {
    StagedSend job;
    job.operation = shared_from_this();
    job.mates = {group_.peer(destination).mate};
    job.record = makeRecord(RecordKind::kStaged, destination);
    job.data = send.data;
    job.bytes = send.bytes;
    job.done = [this] { stepDone(); };
    transfers.add(std::move(job));
    return;
  }
  DirectSend job = directSend(destination);
  job.data = send.data;
  job.bytes = send.bytes;
  transfers.add(std::move(job));
}

void AllToAll::take(int rank, std::span<const std::byte> payload) {
  Source& state = source(rank);
  const Record& record = state.record;
  const auto& to = arguments_.receives[static_cast<size_t>(rank)];
  switch (record.carrier) {
    case Carrier::kNone:
      break;
    case Carrier::kInline:
      if (payload.size() != to.bytes) {
        throw TransportError(concat(
            "a block of ", to.bytes, " bytes came with ", payload.size()));
      }
      std::memcpy(to.data, payload.data(), payload.size());
      state.kept.clear();
      break;
    case Carrier::kExtent: {
      const Segment& owner = group_.mate(record.owner).segment();
      std::memcpy(
          to.data, owner.at(record.place + record.offset, to.bytes), to.bytes);
      NodeMemory::doneReading(owner, record.place);
      break;
    }
    case Carrier::kCrossMemory: {
      MateRead job;
      job.operation = shared_from_this();
      job.mate = &group_.mate(rank);
      job.address = record.place;
      job.to = to.data;
      job.bytes = to.bytes;
      job.failures = record.failures;
      job.done = [this, rank](bool certain) {
        if (!certain) {
          askToConfirm(rank, "");
          return;
        }
        const Record answer = makeRecord(RecordKind::kReadDone, rank);
        group_.mate(rank).post(asBytes(answer));
        received(rank);
      };
      job.failed = [this, rank](bool certain, const std::string& cause) {
        if (certain) {
          group_.peerGone(group_.peer(rank), cause);
        } else {
          askToConfirm(rank, cause);
        }
      };
      group_.engine().transfers().add(std::move(job));
      return;
    }
    case Carrier::kLater:
      if (state.got < to.bytes) {
        return;  // chunks are still to come
      }
      break;
  }
  received(rank);
}

void AllToAll::chunkArrived(
    const Record& record, std::span<const std::byte> payload) {
  Source& state = source(record.source);
  const auto& to = arguments_.receives[static_cast<size_t>(record.source)];
  // The source had our record before it sent, so our call has been made.
  if (!posted() || payload.size() != record.bytes || record.offset > to.bytes ||
      record.bytes > to.bytes - record.offset) {
    throw TransportError(concat(
        "a chunk of ",
        record.bytes,
        " bytes at ",
        record.offset,
        " does not fit the block from rank ",
        record.source));
  }
  std::memcpy(to.data + record.offset, payload.data(), payload.size());
  state.got += payload.size();
  // Its record goes through a node-mate and may be later than the bytes.
  if (state.got == to.bytes && state.posted) {
    received(record.source);
  }
}

void AllToAll::chunkStaged(const Record& record) {
  Mate& mate = group_.mate(record.source);
  const std::byte* data = mate.segment().at(record.place, record.bytes);
  chunkArrived(record, {data, record.bytes});
  NodeMemory::doneReading(mate.segment(), record.place);
  mate.wake();  // its slot is free again
}

void AllToAll::blockRead(const Record& record) {
  Source& state = source(record.source);
  if (record.carrier == Carrier::kLater) {
    // Some group of ours failed meanwhile; not this one, or we would not be
    // here, so the tensor was there all the time.
    const Record answer = makeRecord(RecordKind::kReadConfirmed, record.source);
    group_.mate(record.source).post(asBytes(answer));
  }
  if (state.reads) {
    state.reads = false;
    stepDone();
  }
}

void AllToAll::askToConfirm(int rank, const std::string& readError) {
  Source& state = source(rank);
  state.unconfirmed = true;
  state.readError = readError;
  Record question = makeRecord(RecordKind::kReadDone, rank);
  question.carrier = Carrier::kLater;
  group_.mate(rank).post(asBytes(question));
}

void AllToAll::readConfirmed(const Record& record) {
  Source& state = source(record.source);
  if (!state.unconfirmed) {
    throw TransportError("a read was confirmed that nobody asked about");
  }
  state.unconfirmed = false;
  if (state.readError.empty()) {
    received(record.source);
  } else {
    group_.peerGone(group_.peer(record.source), state.readError);
  }
}

void AllToAll::abandon() {
  const Topology& topology = group_.topology();
  for (int rank = 0; rank < topology.size(); ++rank) {
    Source& state = source(rank);
    if (state.rode > 0) {
      group_.peer(rank).budget.matched(state.rode);
      state.rode = 0;
    }
    if (state.posted && !state.received &&
        state.record.carrier == Carrier::kExtent) {
      releaseExtent(state.record);
      state.received = true;
    }
  }
  for (int node = 0; node < topology.numNodes(); ++node) {
    NodeRide& ride = rides_[static_cast<size_t>(node)];
    if (ride.unmatchedRanks > 0 && ride.bytes > 0) {
      group_.peer(topology.railPeer(node)).budget.matched(ride.bytes);
      ride.unmatchedRanks = 0;
    }
  }
}

void AllToAll::received(int rank) {
  Source& state = source(rank);
  if (!state.received) {
    state.received = true;
    stepDone();
  }
}

std::string AllToAll::waitsFor() const {
  std::string records;
  std::string blocks;
  std::string readers;
  for (size_t i = 0; i < sources_.size(); ++i) {
    const Source& state = sources_[i];
    if (static_cast<int>(i) == group_.topology().rank()) {
      continue;
    }
    if (!state.posted) {
      records += concat(records.empty() ? "" : ", ", i);
    } else if (posted() && !state.received) {
      blocks += concat(
          blocks.empty() ? "" : ", ",
          i,
          " (",
          state.got,
          " of ",
          arguments_.receives[i].bytes,
          " bytes)");
    }
    if (state.reads) {
      readers += concat(readers.empty() ? "" : ", ", i);
    }
  }
  std::string text;
  const auto add = [&](const char* what, const std::string& ranks) {
    if (!ranks.empty()) {
      text += concat(text.empty() ? "" : "; ", what, ranks);
    }
  };
  add("ranks that have not posted it: ", records);
  add("bytes from ranks: ", blocks);
  add("ranks that still read our blocks: ", readers);
  return text.empty() ? "its sends to leave" : text;
}

}  // namespace automoe
