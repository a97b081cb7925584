// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/peer_table.hpp"

#include <algorithm>
#include <utility>

namespace automoe {

Peer& PeerTable::add(uint64_t process, const std::string& host, int64_t pid) {
  std::unique_ptr<Peer>& peer = peers_[process];
  if (peer == nullptr) {
    peer = std::make_unique<Peer>(Peer{
        .process = process,
        .host = host,
        .pid = pid,
        .budget = UnmatchedBudget(config_.eagerBytes, config_.unmatchedBytes)});
  }
  peer->mate = findMate(process);
  return *peer;
}

Peer* PeerTable::find(uint64_t process) {
  const auto found = peers_.find(process);
  return found == peers_.end() ? nullptr : found->second.get();
}

void PeerTable::addMate(std::unique_ptr<Mate> mate) {
  Peer* peer = find(mate->description().process);
  if (peer != nullptr && peer->mate == nullptr) {
    peer->mate = mate.get();
  }
  mates_.push_back(std::move(mate));
}

Mate* PeerTable::findMate(uint64_t process) const {
  const auto found =
      std::find_if(mates_.begin(), mates_.end(), [process](const auto& it) {
        return it->description().process == process;
      });
  return found == mates_.end() ? nullptr : found->get();
}

Mate* PeerTable::mateAt(int descriptor) const {
  const auto found =
      std::find_if(mates_.begin(), mates_.end(), [descriptor](const auto& it) {
        return it->socket() == descriptor ||
               it->processDescriptor() == descriptor;
      });
  return found == mates_.end() ? nullptr : found->get();
}

void PeerTable::mateGone(const Mate& mate) {
  const auto found =
      std::find_if(mates_.begin(), mates_.end(), [&mate](const auto& it) {
        return it.get() == &mate;
      });
  gone_.push_back(std::move(*found));
  mates_.erase(found);
}

}  // namespace automoe
