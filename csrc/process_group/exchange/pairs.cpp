// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/pairs.hpp"

#include <algorithm>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/exchange/group.hpp"

namespace automoe {

PairOperation::PairOperation(
    uint64_t number,
    Clock::time_point deadline,
    bool sends,
    PairArguments arguments)
    : Operation(number, deadline), sends_(sends), arguments_(arguments) {}

std::string PairOperation::title() const {
  return concat(
      sends_ ? "send to " : "recv from ",
      arguments_.peer == PairArguments::kAnySource
          ? std::string("any rank")
          : concat("rank ", arguments_.peer),
      " with tag ",
      arguments_.tag);
}

std::string PairOperation::waitsFor() const {
  if (sends_) {
    return concat("rank ", arguments_.peer, " to take it");
  }
  if (matched_) {
    return concat("bytes from rank ", arguments_.peer);
  }
  return arguments_.peer == PairArguments::kAnySource
             ? "any rank to send"
             : concat("rank ", arguments_.peer, " to send");
}

bool PairOperation::needs(int rank) const {
  return !matched_ && arguments_.peer == rank;
}

PairTable::PairTable(Group& group)
    : group_(group),
      sent_(static_cast<size_t>(group.topology().size())),
      seen_(static_cast<size_t>(group.topology().size())) {}

MessageDescription PairTable::describe(const PairOperation& operation) const {
  MessageDescription description;
  description.operation = OperationKind::kPair;
  description.dtype = operation.arguments_.dtype;
  description.tag = operation.arguments_.tag;
  description.total = operation.arguments_.bytes;
  description.dtypeName = operation.arguments_.dtypeName;
  return description;
}

void PairTable::send(const std::shared_ptr<PairOperation>& operation) {
  const PairArguments& arguments = operation->arguments_;
  pending_.push_back(operation);
  uint64_t& number = sent_[static_cast<size_t>(arguments.peer)];
  group_.messages().send(
      {.operation = operation,
       .key = {.pair = true, .sequence = number++, .peer = arguments.peer},
       .description = describe(*operation),
       .data = arguments.data,
       .bytes = arguments.bytes,
       .done = [this, operation] { ended(operation); }});
}

void PairTable::receive(const std::shared_ptr<PairOperation>& operation) {
  pending_.push_back(operation);
  const PairArguments& wanted = operation->arguments_;
  const auto it = std::find_if(
      unexpected_.begin(), unexpected_.end(), [&](const Kept& kept) {
        return kept.record.plan == wanted.tag &&
               (wanted.peer == PairArguments::kAnySource ||
                wanted.peer == kept.record.source);
      });
  if (it == unexpected_.end()) {
    receives_.push_back(operation);
    return;
  }
  const Kept kept = std::move(*it);
  unexpected_.erase(it);
  match(operation, kept.record, std::as_bytes(std::span(kept.payload)));
}

void PairTable::arrived(
    const Record& record, std::span<const std::byte> payload) {
  group_.messages().checkForm(record, payload);
  const auto source = static_cast<size_t>(record.source);
  if (record.sequence < seen_[source]) {
    throw TransportError(
        concat("rank ", record.source, " sent one message twice"));
  }
  if (record.sequence > seen_[source]) {
    // Larger messages may overtake each other on the network.
    std::string copy(
        reinterpret_cast<const char*>(payload.data()), payload.size());
    early_.emplace(
        std::pair(record.source, record.sequence),
        Kept{record, std::move(copy)});
    return;
  }
  next(record, payload);
  while (!group_.failed()) {
    const auto it = early_.find(std::pair(record.source, seen_[source]));
    if (it == early_.end()) {
      break;
    }
    const Kept kept = std::move(it->second);
    early_.erase(it);
    next(kept.record, std::as_bytes(std::span(kept.payload)));
  }
}

void PairTable::next(const Record& record, std::span<const std::byte> payload) {
  seen_[static_cast<size_t>(record.source)] += 1;
  const auto it =
      std::find_if(receives_.begin(), receives_.end(), [&](const auto& waits) {
        const PairArguments& wanted = waits->arguments_;
        return wanted.tag == record.plan &&
               (wanted.peer == PairArguments::kAnySource ||
                wanted.peer == record.source);
      });
  if (it == receives_.end()) {
    std::string copy(
        reinterpret_cast<const char*>(payload.data()), payload.size());
    unexpected_.push_back({record, std::move(copy)});
    return;
  }
  const auto operation = *it;
  receives_.erase(it);
  match(operation, record, payload);
}

void PairTable::match(
    const std::shared_ptr<PairOperation>& operation,
    const Record& record,
    std::span<const std::byte> payload) {
  operation->matched_ = true;
  operation->arguments_.peer = record.source;
  group_.messages().take(
      record,
      payload,
      {.operation = operation,
       .key =
           {.pair = true, .sequence = record.sequence, .peer = record.source},
       .description = describe(*operation),
       .to = operation->arguments_.data,
       .bytes = operation->arguments_.bytes,
       .done = [this, operation] { ended(operation); }});
}

void PairTable::ended(const std::shared_ptr<PairOperation>& operation) {
  pending_.remove(operation);
  operation->finish(nullptr);
}

void PairTable::lapse(Operation::Clock::time_point now) {
  // Those that are not matched: no bytes are on their way to them.
  std::vector<std::shared_ptr<PairOperation>> lapsed;
  std::erase_if(receives_, [&](const auto& it) {
    if (!it->mayLapse() || it->deadline() >= now) {
      return false;
    }
    lapsed.push_back(it);
    return true;
  });
  for (const auto& it : lapsed) {
    pending_.remove(it);
    it->finish(std::make_exception_ptr(TimeoutError(
        concat(it->title(), " has waited in vain for ", it->waitsFor()))));
  }
}

std::list<std::shared_ptr<PairOperation>> PairTable::abandon() {
  receives_.clear();
  unexpected_.clear();
  early_.clear();
  return std::exchange(pending_, {});
}

}  // namespace automoe
