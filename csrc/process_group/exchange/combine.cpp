// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/combine.hpp"

#include <algorithm>
#include <cstring>
#include <memory>

#include "process_group/common/error.hpp"
#include "process_group/exchange/agreement.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {
namespace {

// Of the slots that rows go to a node-mate through.
constexpr size_t kSlotBytes = 512 * 1024;
// How long a record may wait for the sums that it takes along.
constexpr auto kDeferral = std::chrono::milliseconds(500);

const char* dtypeName(uint8_t dtype) {
  return kernels::nameOf(static_cast<kernels::DType>(dtype));
}

}  // namespace

Combine::Combine(Group& group, uint64_t sequence)
    : Collective(group, sequence, OperationKind::kCombine),
      peers_(static_cast<size_t>(group.topology().size())) {}

Combine::~Combine() = default;

// ---- the own call ----

Record Combine::describe(int destination) const {
  Record record = makeRecord(RecordKind::kPosted, destination);
  record.carrier = Carrier::kNone;
  record.dtype = static_cast<uint8_t>(arguments_.dtype);
  record.plan = route_->fingerprint();
  record.receiveBytes = arguments_.rowBytes();
  record.elementBytes = static_cast<uint32_t>(arguments_.weightBytes());
  record.scalarBytes = static_cast<uint8_t>(arguments_.scalarBytes());
  return record;
}

void Combine::post(
    CombineArguments arguments,
    const Route& route,
    Clock::time_point deadline) {
  arguments_ = std::move(arguments);
  route_ = route;
  postedAt_ = Clock::now();
  openSteps(deadline);
  const Topology& topology = group_.topology();
  for (int rank = 0; rank < topology.size(); ++rank) {
    if (peer(rank).posted && !agrees(rank)) {
      return;  // nothing is sent
    }
  }
  prepare();
  announce();
  for (int rank = 0; rank < topology.size(); ++rank) {
    if (peer(rank).posted) {
      stepDone();
    }
    start(rank);
  }
  tokens_->advance();  // tokens without any expert
  makeSums();
  const auto early = std::exchange(early_, {});
  for (const auto& [record, bytes] : early) {
    if (!finished()) {
      takeChunk(record, std::as_bytes(std::span(bytes)));
    }
  }
  if (!finished()) {
    stepDone();
  }
}

void Combine::announce() {
  const Topology& topology = group_.topology();
  addSteps(static_cast<uint64_t>(topology.size() - 1));
  for (int rank : topology.ranksOf(topology.node())) {
    if (rank != topology.rank()) {
      group_.peer(rank).mate->post(asBytes(describe(rank)));
    }
  }
  for (int i = 1; i < topology.numNodes(); ++i) {
    const int node = (topology.node() + i) % topology.numNodes();
    const int rank = topology.railPeer(node);
    Peer& to = peer(rank);
    if (partials_->isOneUnit(rank) &&
        (to.posted || group_.peer(rank).budget.tryRide(to.sendBytes))) {
      to.rode = to.posted ? 0 : to.sendBytes;
      to.started = true;
      to.deferred = true;  // until its sums are there
    } else {
      sendRecord(rank, describe(rank), {});
    }
  }
}

void Combine::remind(Clock::time_point now) {
  if (now < postedAt_ + kDeferral) {
    return;
  }
  // A node-mate is late. The others shall wait for it and not for this rank.
  for (int rank = 0; rank < group_.topology().size() && !finished(); ++rank) {
    if (peer(rank).deferred) {
      peer(rank).deferred = false;
      sendRecord(rank, describe(rank), {});
      startSend(rank);
    }
  }
}

void Combine::prepare() {
  const Topology& topology = group_.topology();
  partials_.emplace(*route_, arguments_, topology);
  tokens_.emplace(*route_, arguments_);
  addSteps(1);
  for (int rank = 0; rank < topology.size(); ++rank) {
    Peer& to = peer(rank);
    if (topology.nodeOf(rank) != topology.node()) {
      if (topology.railPeerOf(rank, topology.node()) == topology.rank()) {
        to.sendBytes = partials_->bytesFor(rank);
      }
    } else if (rank != topology.rank()) {
      to.stream = std::make_shared<RowStream>(
          *route_,
          arguments_,
          combineUnits(*route_, arguments_, topology, rank));
    }
    addSteps(bytesFor(rank) > 0 ? 1 : 0);
    group_.mutableCounters().networkPayloadBytes += to.sendBytes;
  }
}

uint64_t Combine::bytesFor(int rank) const {
  const Peer& to = peer(rank);
  return to.stream == nullptr ? to.sendBytes : to.stream->bytes();
}

void Combine::start(int rank) {
  Peer& to = peer(rank);
  const uint64_t bytes = bytesFor(rank);
  if (to.started || bytes == 0) {
    return;
  }
  if (!to.posted) {
    UnmatchedBudget& budget = group_.peer(rank).budget;
    const bool mayLeave = to.sendBytes > 0 ? budget.tryRide(bytes)
                                           : budget.tryRide(bytes, kSlotBytes);
    if (!mayLeave) {
      return;
    }
    to.rode = bytes;
  }
  to.started = true;
  if (to.sendBytes > 0) {
    startSend(rank);
  } else {
    startStream(rank);
  }
}

void Combine::startSend(int rank) {
  DirectSend job = directSend(rank);
  job.bytes = peer(rank).sendBytes;
  job.next = [this, rank](Record& record, size_t, std::string& bytes) {
    Peer& to = peer(rank);
    if (to.chunks.empty()) {
      return false;
    }
    Chunk chunk = std::move(to.chunks.front());
    to.chunks.pop_front();
    record.offset = chunk.first;
    record.rows = chunk.rows;
    bytes = std::move(chunk.bytes);
    chunkBytes_ -= bytes.size();
    makeSums();
    return true;
  };
  group_.engine().transfers().add(std::move(job));
}

void Combine::startStream(int rank) {
  const auto& stream = peer(rank).stream;
  StagedSend job;
  job.operation = shared_from_this();
  job.mates = {group_.peer(rank).mate};
  job.record = makeRecord(RecordKind::kStaged, rank);
  job.record.carrier = Carrier::kExtent;
  job.record.owner = group_.topology().rank();
  job.bytes = stream->bytes();
  job.slotBytes = kSlotBytes;
  job.largestChunk = stream->largestUnit();
  job.next = [stream](Record& record, size_t room, std::byte* to) {
    return stream->next(room, to, record.rows);
  };
  job.done = [this] { stepDone(); };
  group_.engine().transfers().add(std::move(job));
}

// ---- what arrives ----

void Combine::sourcePosted(
    const Record& record, std::span<const std::byte> payload) {
  Peer& from = peer(record.source);
  if (from.posted) {
    throw TransportError(
        concat("rank ", record.source, " posted one operation twice"));
  }
  const bool brings = record.carrier == Carrier::kInline;
  if (!brings && (record.carrier != Carrier::kNone || !payload.empty())) {
    throw TransportError("a combine was posted with bytes that are no sums");
  }
  from.posted = true;
  from.record = record;
  if (posted()) {
    if (!agrees(record.source)) {
      return;
    }
    settle(record.source);
    start(record.source);
  }
  if (brings) {
    chunkArrived(record, payload);
  }
  if (posted() && !finished()) {
    stepDone();
  }
}

bool Combine::agrees(int rank) {
  const Record own = describe(rank);
  const std::string text =
      findRowDisagreement(peer(rank).record, own, &dtypeName);
  if (text.empty()) {
    return true;
  }
  group_.fail(
      FailureKind::kMismatch,
      concat(title(), " of group ", group_.name(), ": ", text));
  return false;
}

void Combine::settle(int rank) {
  if (peer(rank).rode > 0) {
    group_.peer(rank).budget.matched(peer(rank).rode);
    peer(rank).rode = 0;
  }
}

void Combine::chunkStaged(const Record& record) {
  if (record.owner != record.source || record.rows == 0) {
    throw TransportError("staged rows of no rank");
  }
  (void)extentOf(record);  // throws when it is none of a node-mate
  peer(record.source)
      .slots.push_back({.record = record, .unitsLeft = record.rows});
  if (posted()) {
    makeSums();
  }
}

void Combine::chunkArrived(
    const Record& record, std::span<const std::byte> payload) {
  const Topology& topology = group_.topology();
  const int node = topology.nodeOf(record.source);
  if (node == topology.node() || topology.railPeer(node) != record.source ||
      payload.size() != record.bytes) {
    throw TransportError(
        concat("sums of rank ", record.source, " came to this rank"));
  }
  if (posted()) {
    takeChunk(record, payload);
  } else {
    early_.emplace_back(
        record,
        std::string(
            reinterpret_cast<const char*>(payload.data()), payload.size()));
  }
}

void Combine::takeChunk(
    const Record& record, std::span<const std::byte> payload) {
  auto chunk = std::make_unique_for_overwrite<std::byte[]>(payload.size());
  std::memcpy(chunk.get(), payload.data(), payload.size());
  tokens_->arrived(
      group_.topology().nodeOf(record.source),
      record.offset,
      record.rows,
      std::move(chunk),
      payload.size());
  outputProgressed();
}

// ---- the end ----

void Combine::abandon() {
  for (Peer& it : peers_) {
    for (const Slot& slot : it.slots) {
      releaseExtent(slot.record);
    }
    it.slots.clear();
  }
  for (int rank = 0; rank < group_.topology().size(); ++rank) {
    settle(rank);
  }
}

std::string Combine::waitsFor() const {
  const Topology& topology = group_.topology();
  std::string records;
  for (int rank = 0; rank < topology.size(); ++rank) {
    if (rank != topology.rank() && !peer(rank).posted) {
      records += concat(records.empty() ? "" : ", ", rank);
    }
  }
  std::string text;
  if (!records.empty()) {
    text = concat("ranks that have not posted it: ", records);
  }
  const auto add = [&](const auto&... parts) {
    text += concat(text.empty() ? "" : "; ", parts...);
  };
  if (!tokens_.has_value() || outputDone_) {
    return text.empty() ? "its sends to leave" : text;
  }
  for (int node = 0; node < topology.numNodes(); ++node) {
    const uint64_t missing = tokens_->missing(node);
    if (missing > 0 && node != topology.node()) {
      add(missing, " sums from rank ", topology.railPeer(node));
    }
  }
  if (!partials_->done()) {
    for (int rank : topology.ranksOf(topology.node())) {
      if (rank != topology.rank() && peer(rank).slots.empty() &&
          partials_->bytesOf(topology.localRankOf(rank)) > 0) {
        add("rows of rank ", rank);
      }
    }
  }
  return text.empty() ? "its sends to leave" : text;
}

}  // namespace automoe
