// SPDX-License-Identifier: Apache-2.0
// What this process keeps of the routes that calls on devices are given.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include "process_group/exchange/device_exchange.hpp"
#include "process_group/exchange/route.hpp"
#include "process_group/route_tensors.hpp"

namespace automoe {

/// The sizes that the arguments of a call have to have.
struct RouteFacts {
  int rank = 0;
  int size = 0;
  int64_t numTokens = 0;
  int64_t topK = 0;
  int64_t numSendRows = 0;
  int64_t numReceiveRows = 0;
  bool sumsPerNode = true;
};

RouteFacts factsOf(const Route& route);

/// The lists of one route by the exchange that has them on its device.
/// Thread-safe.
class ListsOfRoute {
 public:
  using Lists = std::shared_ptr<const DeviceRoute>;

  /// Those of this exchange, made by `make` at the first call.
  Lists of(const DeviceExchange* exchange, const std::function<Lists()>& make);
  void forget(const DeviceExchange* exchange);

 private:
  std::mutex mutex_;
  std::map<const DeviceExchange*, Lists> lists_;
};

/// A route that has been checked, without its words: so it does not change when
/// those do. Immutable but for its lists and tensors.
struct KnownRoute {
  /// What a plan on a device is for the host, which waits for it.
  struct OnHost {
    at::Tensor words;
    at::Tensor offsets;  // ends of the experts' rows
  };

  RouteFacts facts;
  std::vector<int32_t> nodeOfRank;
  std::vector<size_t> sendBegins;   // (nodes + 1,) of the send rows
  std::vector<int32_t> sendTokens;  // (S,) the token of each send row
  /// Ends of the experts' rows, on the host; undefined where a plan on the
  /// host's tensors, or a device, made the route.
  at::Tensor offsets;
  /// Of a route that a device has made; else empty, as the tensor has the
  /// words.
  std::function<OnHost()> onHost;
  std::shared_ptr<ListsOfRoute> lists = std::make_shared<ListsOfRoute>();
  std::shared_ptr<RouteTensors> tensors = std::make_shared<RouteTensors>();
  /// Tells routes of this process apart.
  uint64_t serial = nextSerial();

 private:
  static uint64_t nextSerial() {
    static std::atomic<uint64_t> last{0};
    return ++last;
  }
};

/// Throws InvalidArgument when these are not the words of a route. O(words).
KnownRoute readRoute(std::span<const int32_t> words);

/// Finds what is known of a route by where its words lie. Words that lie
/// elsewhere are looked at once: they may be a copy of others that are known,
/// by their hash, or are read. Nothing of a route is kept when its tensors are
/// gone. Thread-safe.
class KnownRoutes {
 public:
  static KnownRoutes& instance();

  /// Of the words of a route: int32, contiguous, on the CPU. Throws
  /// InvalidArgument when they are not those of a route.
  std::shared_ptr<const KnownRoute> find(const at::Tensor& words);
  /// For find(), where more is known of it than its words tell.
  void add(const at::Tensor& words, KnownRoute route);
  /// Drops the lists of an exchange that has ended.
  void forget(const DeviceExchange* exchange);

 private:
  struct Entry {
    c10::weak_intrusive_ptr<c10::StorageImpl> storage;
    int64_t count;
    int64_t version;  // of the tensor
    uint64_t hash;    // of the words
    std::shared_ptr<const KnownRoute> route;

    bool isOf(const at::Tensor& words) const;
  };

  // While it is locked.

  /// Those whose tensors are gone, for the caller to drop when it is unlocked:
  /// that may take the GIL.
  std::vector<Entry> takeEnded();
  void keep(
      const at::Tensor& words,
      uint64_t hash,
      std::shared_ptr<const KnownRoute> route);

  std::mutex mutex_;
  std::unordered_map<const void*, Entry> entries_;  // by address of the words
};

}  // namespace automoe
