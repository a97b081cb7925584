// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_call.hpp"

#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/agreement.hpp"
#include "process_group/exchange/engine.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {

DeviceCall::DeviceCall(Group& group, uint64_t sequence, OperationKind kind)
    : Multicast(group, sequence, kind) {}

void DeviceCall::post(
    const DeviceCallFacts& facts,
    DeviceStreams streams,
    Clock::time_point deadline) {
  facts_ = facts;
  streams_ = std::move(streams);
  pin();
  group_.engine().addPolling(1);
  postCasts(deadline, 1);  // the streams are the one more
}

void DeviceCall::remind(Clock::time_point) {
  if (!streams_.happened) {
    return;
  }
  try {
    if (!streams_.happened()) {
      return;
    }
  } catch (const Error& error) {
    group_.fail(
        FailureKind::kTransport,
        concat(
            "rank ",
            group_.topology().rank(),
            ", ",
            title(),
            ": ",
            error.what()));
    return;
  }
  streams_ = {};
  group_.engine().addPolling(-1);
  unpin();
  stepDone();
}

void DeviceCall::abandon() {
  Multicast::abandon();
  if (streams_.happened) {
    group_.engine().addPolling(-1);
    abandoned_ = true;
  }
  // From here on it is for whoever is told to unpin().
  if (const auto failed = std::exchange(streams_, {}).failed) {
    failed();
  }
}

std::string DeviceCall::waitsFor() const {
  const std::string others = Multicast::waitsFor();
  return streams_.happened || abandoned_
             ? concat("the streams of its own device; ", others)
             : others;
}

size_t DeviceCall::nextChunk(int, uint64_t, size_t, Record&) const {
  return 0;
}

void DeviceCall::fill(int, const Record&, std::byte*) const {}

void DeviceCall::take(
    int source, const Record&, std::span<const std::byte> bytes) {
  throw TransportError(
      concat("rank ", source, " sent ", bytes.size(), " bytes for ", title()));
}

void DeviceCall::describe(Record& record) const {
  record.plan = facts_.plan;
  record.dtype = facts_.dtype;
  record.receiveBytes = facts_.rowBytes;
  record.elementBytes = facts_.weightBytes;
  record.scalarBytes = facts_.scalarBytes;
  record.layout = facts_.layout;
  record.rows =
      graphUseOf(facts_.captured, facts_.fenced) | wireUseOf(facts_.wire);
}

std::string DeviceCall::disagreement(const Record& theirs) const {
  Record own;
  describe(own);
  own.source = group_.topology().rank();
  std::string text = findRowDisagreement(theirs, own, facts_.dtypeName);
  if (text.empty()) {
    text = findWireDisagreement(theirs, own);
  }
  return text.empty() ? findGraphDisagreement(theirs, own) : text;
}

}  // namespace automoe
