// SPDX-License-Identifier: Apache-2.0
#include "process_group/known_routes.hpp"

#include <utility>

#include "process_group/exchange/route_hash.hpp"

namespace automoe {
namespace {

std::span<const int32_t> spanOf(const at::Tensor& words) {
  return {words.const_data_ptr<int32_t>(), static_cast<size_t>(words.numel())};
}

uint64_t hashOf(std::span<const int32_t> words) {
  uint64_t hash = kHashSeed;
  for (const int32_t word : words) {
    hash = mixHash(hash, static_cast<uint32_t>(word));
  }
  return hash;
}

/// Rises with each change in place that torch sees; aliases that autograd hands
/// out have the same.
int64_t versionOf(const at::Tensor& tensor) {
  const auto& version = tensor.unsafeGetTensorImpl()->version_counter();
  return version.enabled() ? version.current_version() : -1;
}

}  // namespace

RouteFacts factsOf(const Route& route) {
  return {
      .rank = route.rank(),
      .size = route.size(),
      .numTokens = route.numTokens(),
      .topK = route.topK(),
      .numSendRows = static_cast<int64_t>(route.numSendRows()),
      .numReceiveRows = route.numReceiveRows(),
      .sumsPerNode = route.sumsPerNode()};
}

// ---- ListsOfRoute ----

ListsOfRoute::Lists ListsOfRoute::of(
    const DeviceExchange* exchange, const std::function<Lists()>& make) {
  const std::lock_guard lock(mutex_);
  Lists& lists = lists_[exchange];
  if (lists == nullptr) {
    lists = make();
  }
  return lists;
}

void ListsOfRoute::forget(const DeviceExchange* exchange) {
  const std::lock_guard lock(mutex_);
  lists_.erase(exchange);
}

KnownRoute readRoute(std::span<const int32_t> words) {
  const Route route(words);
  const auto nodes = route.nodeOfRank();
  KnownRoute known;
  known.facts = factsOf(route);
  known.nodeOfRank.assign(nodes.begin(), nodes.end());
  for (int node = 0; node <= route.numNodes(); ++node) {
    known.sendBegins.push_back(route.sendBegin(node));
  }
  known.sendTokens.resize(route.numSendRows());
  for (size_t row = 0; row < known.sendTokens.size(); ++row) {
    known.sendTokens[row] = route.sendToken(row);
  }
  return known;
}

// ---- KnownRoutes ----

KnownRoutes& KnownRoutes::instance() {
  // Leaked: tensors must not be dropped while the process exits.
  static auto* routes = new KnownRoutes();
  return *routes;
}

bool KnownRoutes::Entry::isOf(const at::Tensor& words) const {
  return !storage.expired() &&
         storage._unsafe_get_target() ==
             words.storage().unsafeGetStorageImpl() &&
         count == words.numel() && version == versionOf(words);
}

std::shared_ptr<const KnownRoute> KnownRoutes::find(const at::Tensor& words) {
  {
    const std::lock_guard lock(mutex_);
    const auto found = entries_.find(words.const_data_ptr());
    if (found != entries_.end() && found->second.isOf(words)) {
      return found->second.route;
    }
  }
  const uint64_t hash = hashOf(spanOf(words));
  std::vector<Entry> ended;
  {
    const std::lock_guard lock(mutex_);
    ended = takeEnded();
    for (const auto& [address, entry] : entries_) {
      if (entry.hash == hash && entry.count == words.numel()) {
        const std::shared_ptr<const KnownRoute> route = entry.route;
        keep(words, hash, route);
        return route;
      }
    }
  }
  const auto route = std::make_shared<KnownRoute>(readRoute(spanOf(words)));
  const std::lock_guard lock(mutex_);
  keep(words, hash, route);
  return route;
}

void KnownRoutes::add(const at::Tensor& words, KnownRoute route) {
  const uint64_t hash = hashOf(spanOf(words));
  std::vector<Entry> ended;
  const std::lock_guard lock(mutex_);
  ended = takeEnded();
  keep(words, hash, std::make_shared<KnownRoute>(std::move(route)));
}

std::vector<KnownRoutes::Entry> KnownRoutes::takeEnded() {
  std::vector<Entry> ended;
  for (auto it = entries_.begin(); it != entries_.end();) {
    if (it->second.storage.expired()) {
      ended.push_back(std::move(it->second));
      it = entries_.erase(it);
    } else {
      ++it;
    }
  }
  return ended;
}

void KnownRoutes::keep(
    const at::Tensor& words,
    uint64_t hash,
    std::shared_ptr<const KnownRoute> route) {
  entries_.insert_or_assign(
      words.const_data_ptr(),
      Entry{
          c10::weak_intrusive_ptr<c10::StorageImpl>(
              words.storage().getWeakStorageImpl()),
          words.numel(),
          versionOf(words),
          hash,
          std::move(route)});
}

void KnownRoutes::forget(const DeviceExchange* exchange) {
  const std::lock_guard lock(mutex_);
  for (auto& [address, entry] : entries_) {
    entry.route->lists->forget(exchange);
  }
}

}  // namespace automoe
