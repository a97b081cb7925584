// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/collective.hpp"

#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {

int rotation(const Topology& topology, int destination) {
  const int nodes = topology.numNodes();
  const int node = topology.nodeOf(destination);
  const auto perNode = static_cast<int>(topology.ranksOf(node).size());
  const int hop = (node - topology.node() + nodes) % nodes;
  const int rail = (topology.localRankOf(destination) -
                    topology.localRank() % perNode + perNode) %
                   perNode;
  return hop * topology.size() + rail;
}

Collective::Collective(Group& group, uint64_t sequence, OperationKind kind)
    : Operation(sequence, Clock::time_point::max()),
      group_(group),
      kind_(kind) {}

std::string Collective::title() const {
  return concat(nameOf(kind_), " number ", sequence());
}

void Collective::unexpected(const char* what, const Record& record) const {
  throw TransportError(
      concat(what, " of rank ", record.source, " came for ", title()));
}

void Collective::chunkArrived(
    const Record& record, std::span<const std::byte>) {
  unexpected("a direct chunk", record);
}

void Collective::chunkStaged(const Record& record) {
  unexpected("a staged chunk", record);
}

void Collective::castArrived(const Record& record, std::span<const std::byte>) {
  unexpected("a chunk for the node", record);
}

void Collective::blockRead(const Record& record) {
  unexpected("an answer", record);
}

void Collective::readConfirmed(const Record& record) {
  unexpected("a confirmation", record);
}

void Collective::openSteps(Clock::time_point deadline) {
  setDeadline(deadline);
  posted_ = true;
  steps_ = 1;
}

void Collective::stepDone() {
  steps_ -= 1;
  if (steps_ == 0) {
    group_.operationEnded(sequence());
    finish(nullptr);
  }
}

Record Collective::makeRecord(RecordKind kind, int destination) const {
  Record record = group_.makeRecord(kind, sequence(), destination);
  record.operation = kind_;
  return record;
}

void Collective::sendRecord(
    int destination, Record record, std::string payload) {
  record.bytes = payload.size();
  addSteps(1);
  group_.engine().network().send(
      group_.peer(destination).process,
      asBytes(record),
      {},
      [self = shared_from_this()](bool ok) {
        if (ok && !self->finished()) {
          self->stepDone();
        }
      },
      std::move(payload));
}

DirectSend Collective::directSend(int destination) {
  DirectSend job;
  job.operation = shared_from_this();
  job.process = group_.peer(destination).process;
  job.record = makeRecord(RecordKind::kPayload, destination);
  job.order = {sequence(), rotation(group_.topology(), destination)};
  job.done = [this] { stepDone(); };
  return job;
}

std::span<const std::byte> Collective::extentOf(const Record& record) const {
  return {
      group_.mate(record.owner).segment().at(record.place, record.bytes),
      record.bytes};
}

void Collective::releaseExtent(const Record& record) const {
  try {
    Mate& owner = group_.mate(record.owner);
    NodeMemory::doneReading(owner.segment(), record.place);
    if (record.kind == RecordKind::kStaged) {
      owner.wake();  // its slot is free again
    }
  } catch (const TransportError&) {
    // It named no extent; that is what the group may be failing for.
  }
}

}  // namespace automoe
