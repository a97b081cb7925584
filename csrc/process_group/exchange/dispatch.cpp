// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/dispatch.hpp"

#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/agreement.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {

Dispatch::Dispatch(Group& group, uint64_t sequence)
    : Multicast(group, sequence, OperationKind::kDispatch) {}

Dispatch::~Dispatch() = default;

void Dispatch::post(
    DispatchArguments arguments,
    const Route& route,
    Clock::time_point deadline) {
  arguments_ = std::move(arguments);
  route_ = route;
  postCasts(deadline);
}

uint64_t Dispatch::castBytes(int node) const {
  return packedBytes(
      *route_,
      arguments_,
      route_->sendBegin(node),
      route_->sendBegin(node + 1));
}

size_t Dispatch::largestRow() const {
  return rowBytesOf(arguments_) +
         static_cast<size_t>(route_->topK()) * arguments_.weightBytes;
}

size_t Dispatch::nextChunk(
    int node, uint64_t next, size_t room, Record& chunk) const {
  const size_t begin = route_->sendBegin(node) + next;
  const size_t end = rowsThatFit(
      *route_, arguments_, begin, route_->sendBegin(node + 1), room);
  chunk.offset = next;
  chunk.rows = static_cast<uint32_t>(end - begin);
  return packedBytes(*route_, arguments_, begin, end);
}

void Dispatch::fill(int node, const Record& chunk, std::byte* to) const {
  const size_t begin = route_->sendBegin(node) + chunk.offset;
  packRows(*route_, arguments_, begin, begin + chunk.rows, to);
}

void Dispatch::take(
    int source, const Record& chunk, std::span<const std::byte> bytes) {
  const size_t first = route_->landBegin(source);
  const size_t count = route_->landBegin(source + 1) - first;
  if (chunk.offset > count || chunk.rows > count - chunk.offset) {
    throw TransportError(concat(
        "rows ",
        chunk.offset,
        " to ",
        chunk.offset + chunk.rows,
        " of rank ",
        source,
        ", which has ",
        count));
  }
  const size_t begin = first + chunk.offset;
  unpackRows(*route_, arguments_, begin, begin + chunk.rows, bytes);
}

void Dispatch::describe(Record& record) const {
  record.plan = route_->fingerprint();
  record.dtype = arguments_.dtype;
  record.layout = layoutOf(arguments_);
  record.elementBytes = arguments_.weightBytes;
  record.receiveBytes = rowBytesOf(arguments_);
}

std::string Dispatch::disagreement(const Record& theirs) const {
  Record own;
  describe(own);
  own.source = group_.topology().rank();
  return findRowDisagreement(theirs, own, arguments_.dtypeName);
}

}  // namespace automoe
