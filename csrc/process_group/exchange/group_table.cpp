// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/group_table.hpp"

#include <algorithm>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"

namespace automoe {
namespace {

// Peers send at most their budgets ahead, so this is only against strangers.
constexpr size_t kEarlyBytes = size_t{256} << 20;

}  // namespace

void GroupTable::add(std::shared_ptr<Group> group) {
  const uint64_t id = group->id();
  groups_.emplace(id, std::move(group));
  const auto found = early_.find(id);
  if (found == early_.end()) {
    return;
  }
  const std::vector<Early> messages = std::move(found->second);
  early_.erase(found);
  for (const Early& it : messages) {
    earlyBytes_ -= it.message.size();
    const auto bytes = std::as_bytes(std::span(it.message));
    deliver(
        bytes.first(sizeof(Record)),
        bytes.subspan(sizeof(Record)),
        it.fromMate);
  }
}

void GroupTable::deliver(Bytes header, Bytes payload, const Mate* fromMate) {
  Record record;
  try {
    record = parseRecord(header);
  } catch (const TransportError& error) {
    log(LogLevel::kWarn, concat("dropped a message: ", error.what()));
    return;
  }
  const auto found = groups_.find(record.group);
  if (found == groups_.end()) {
    keepEarly(record.group, header, payload, fromMate);
    return;
  }
  const std::shared_ptr<Group> group = found->second;
  try {
    group->handle(record, payload, fromMate);
  } catch (const Error& error) {
    group->fail(
        FailureKind::kTransport,
        concat("message from rank ", record.source, ": ", error.what()));
  }
}

void GroupTable::keepEarly(
    uint64_t group, Bytes header, Bytes payload, const Mate* fromMate) {
  if (ended_.contains(group)) {
    return;
  }
  const size_t bytes = header.size() + payload.size();
  if (earlyBytes_ + bytes > kEarlyBytes) {
    log(LogLevel::kWarn, "dropped a message of a group that is not known");
    return;
  }
  Early early{.message = {}, .fromMate = fromMate};
  early.message.reserve(bytes);
  early.message.append(
      reinterpret_cast<const char*>(header.data()), header.size());
  early.message.append(
      reinterpret_cast<const char*>(payload.data()), payload.size());
  earlyBytes_ += bytes;
  early_[group].push_back(std::move(early));
}

std::vector<std::shared_ptr<Group>> GroupTable::all() const {
  std::vector<std::shared_ptr<Group>> groups;
  for (const auto& [id, group] : groups_) {
    groups.push_back(group);
  }
  return groups;
}

bool GroupTable::anyBusy() const {
  return std::any_of(groups_.begin(), groups_.end(), [](const auto& it) {
    return it.second->busy();
  });
}

void GroupTable::removeEnded() {
  std::erase_if(groups_, [this](const auto& it) {
    if (!it.second->over()) {
      return false;
    }
    ended_.insert(it.first);
    return true;
  });
}

}  // namespace automoe
