// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/plan_exchange.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {

PlanExchange::PlanExchange(Group& group, uint64_t sequence)
    : Multicast(group, sequence, OperationKind::kPlan),
      received_(static_cast<size_t>(group.topology().size())) {}

PlanExchange::~PlanExchange() = default;

void PlanExchange::post(
    std::shared_ptr<RouteBuilder> builder, Clock::time_point deadline) {
  builder_ = std::move(builder);
  const Topology& topology = group_.topology();
  for (int node = 0; node < topology.numNodes(); ++node) {
    lists_.push_back(builder_->listFor(node));
  }
  const std::string& own = lists_[static_cast<size_t>(topology.node())];
  builder_->add(topology.rank(), std::as_bytes(std::span(own)));
  postCasts(deadline);
}

uint64_t PlanExchange::castBytes(int node) const {
  return lists_[static_cast<size_t>(node)].size();
}

// To the casts below a list is a row of bytes: a "row" is one byte.
size_t PlanExchange::nextChunk(
    int node, uint64_t next, size_t room, Record& chunk) const {
  const size_t bytes = std::min<size_t>(room, castBytes(node) - next);
  chunk.offset = next;
  chunk.rows = static_cast<uint32_t>(bytes);
  return bytes;
}

void PlanExchange::fill(int node, const Record& chunk, std::byte* to) const {
  std::memcpy(
      to, lists_[static_cast<size_t>(node)].data() + chunk.offset, chunk.rows);
}

void PlanExchange::take(
    int source, const Record& chunk, std::span<const std::byte> bytes) {
  std::string& list = received_[static_cast<size_t>(source)];
  if (chunk.offset != list.size()) {
    throw TransportError("a piece of a plan's list is missing");
  }
  list.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (list.size() == announcedBytes(source)) {
    builder_->add(source, std::as_bytes(std::span(list)));
    list = {};
  }
}

void PlanExchange::describe(Record& record) const {
  (void)record;  // the facts stand in front of each list
}

std::string PlanExchange::disagreement(const Record& theirs) const {
  (void)theirs;
  return "";
}

}  // namespace automoe
