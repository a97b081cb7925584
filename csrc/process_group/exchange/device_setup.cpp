// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_setup.hpp"

#include <algorithm>
#include <cstring>
#include <functional>
#include <iterator>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"
#include "process_group/exchange/device_agreement.hpp"

namespace automoe {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr auto kPoll = std::chrono::microseconds(100);
// Enough for a few bytes; connections of a network are made meanwhile.
constexpr auto kLongest = milliseconds(60'000);
// For a device that does not come to its end any more.
constexpr auto kPatience = std::chrono::seconds(10);
// Apart, as ranks would use them for tensors.
constexpr size_t kStride = 256;

class DevicesSettingUp {
 public:
  DevicesSettingUp(
      Engine& engine,
      Group& group,
      Device& device,
      DeviceNetwork* network,
      milliseconds timeout)
      : engine_(engine),
        group_(group),
        topology_(group.topology()),
        device_(device),
        network_(network),
        timeout_(std::min(timeout, kLongest)),
        agreement_(engine, group, timeout) {}
  ~DevicesSettingUp();
  DevicesSettingUp(const DevicesSettingUp&) = delete;
  DevicesSettingUp& operator=(const DevicesSettingUp&) = delete;

  DeviceSetup run();

 private:
  DeviceMemory::Offer makeOwn();
  void openMates(const std::vector<DeviceMemory::Offer>& offers);
  void handOver();
  void checkHandOver() const;
  std::vector<int> peersToMeet() const;
  void meetPeers();
  void awaitStream(const char* what);
  bool happens(Device::Event event, steady_clock::time_point limit) const;
  size_t places() const { return static_cast<size_t>(topology_.size()) + 1; }
  size_t placeOf(int rank) const {
    return (static_cast<size_t>(rank) + 1) * kStride;
  }
  std::byte* readFrom(int mate) const { return host_ + placeOf(mate); }

  Engine& engine_;
  Group& group_;
  const Topology& topology_;
  Device& device_;
  DeviceNetwork* const network_;
  const milliseconds timeout_;
  DeviceAgreement agreement_;
  DeviceSetup made_;
  Device::Event event_ = nullptr;
  std::byte* host_ = nullptr;     // a place for each rank, and one more
  std::byte* scratch_ = nullptr;  // the same on the device
};

DeviceSetup DevicesSettingUp::run() {
  const auto offers = agreement_.gather([this] { return makeOwn(); });
  agreement_.take([&] { openMates(offers); });
  // Apart, so that a rank where one of these fails is not waited for.
  agreement_.takeWith(
      peersToMeet(),
      [this] {
        handOver();
        meetPeers();
      },
      [this] { network_->abort(); });
  agreement_.take([this] {
    awaitStream("what its node-mates hand over and its rail peers send");
  });
  agreement_.take([this] { checkHandOver(); });
  return std::exchange(made_, {});
}

DeviceMemory::Offer DevicesSettingUp::makeOwn() {
  const auto mates = static_cast<size_t>(topology_.localSize());
  AUTOMOE_CHECK(
      mates < kernels::RowBases::kMost,
      "a node of ",
      mates,
      " ranks has more devices than the ",
      kernels::RowBases::kMost - 1,
      " that a kernel can read from");
  AUTOMOE_CHECK(
      network_ != nullptr || topology_.numNodes() == 1,
      "devices of several nodes need a network");
  made_.stream = device_.makeStream();
  event_ = device_.makeEvent();
  host_ = device_.allocateHost(places() * kStride);
  scratch_ = device_.allocate(places() * kStride);
  made_.memory = std::make_unique<DeviceMemory>(engine_, group_, device_);
  const DeviceMemory::Offer offer = made_.memory->offer();
  device_.run(
      made_.stream, [](kernels::DeviceStream) { kernels::loadKernels(); });
  awaitStream("the kernels");
  return offer;
}

void DevicesSettingUp::openMates(
    const std::vector<DeviceMemory::Offer>& offers) {
  std::vector<DeviceMemory::Offer> ofNode;
  for (int rank : topology_.ranksOf(topology_.node())) {
    ofNode.push_back(offers[static_cast<size_t>(rank)]);
  }
  made_.memory->open(ofNode);
  made_.memory->tryFlags(made_.stream);
  awaitStream("a flag of its own (cuStreamWaitValue32 on memory of the host)");
}

/// Every rank reads from each node-mate what only that one can have written.
void DevicesSettingUp::handOver() {
  if (topology_.localSize() == 1) {
    return;
  }
  DeviceMemory& memory = *made_.memory;
  const int32_t own = topology_.rank() + 1;
  std::memcpy(host_, &own, sizeof(own));
  const auto self = static_cast<size_t>(topology_.localRank());
  device_.copy(made_.stream, memory.arena(self), host_, sizeof(own));
  memory.setReady(made_.stream);
  memory.awaitReady(made_.stream);
  for (const int mate : topology_.ranksOf(topology_.node())) {
    // By a kernel, as calls do: what a copy can read is more.
    kernels::GatherRows gather;
    gather.to = scratch_ + placeOf(mate);
    gather.count = 1;
    gather.rowBytes = sizeof(own);
    gather.from.at[0] =
        memory.arena(static_cast<size_t>(topology_.localRankOf(mate)));
    device_.run(made_.stream, [gather](kernels::DeviceStream stream) {
      kernels::enqueue(gather, stream);
    });
    device_.copy(
        made_.stream, readFrom(mate), scratch_ + placeOf(mate), sizeof(own));
  }
}

void DevicesSettingUp::checkHandOver() const {
  for (const int mate : topology_.ranksOf(topology_.node())) {
    int32_t got = 0;
    std::memcpy(&got, readFrom(mate), sizeof(got));
    if (topology_.localSize() > 1 && got != mate + 1) {
      throw DeviceError(concat(
          device_.name(),
          " reads ",
          got,
          " from the memory of rank ",
          mate,
          ", expected ",
          mate + 1,
          "; does peer access between the two GPUs work?"));
    }
  }
}

/// Ranks of other nodes from and to which calls will move rows.
std::vector<int> DevicesSettingUp::peersToMeet() const {
  std::vector<int> peers;
  for (int node = 0; node < topology_.numNodes(); ++node) {
    if (node != topology_.node()) {
      peers.push_back(topology_.railPeer(node));
      std::ranges::copy(topology_.railSources(node), std::back_inserter(peers));
    }
  }
  std::ranges::sort(peers);
  const auto twice = std::ranges::unique(peers);
  peers.erase(twice.begin(), twice.end());
  return peers;
}

/// A byte in both directions to each of them: NCCL connects two ranks when they
/// first meet, and waits for both hosts.
void DevicesSettingUp::meetPeers() {
  if (network_ == nullptr) {
    return;
  }
  std::vector<DeviceNetwork::Send> sends;
  std::vector<DeviceNetwork::Receive> receives;
  for (const int rank : peersToMeet()) {
    sends.push_back({rank, scratch_, 1});
    receives.push_back({rank, scratch_ + placeOf(rank), 1});
  }
  network_->exchange(made_.stream, sends, receives);
}

void DevicesSettingUp::awaitStream(const char* what) {
  device_.record(event_, made_.stream);
  if (happens(event_, steady_clock::now() + timeout_)) {
    return;
  }
  const std::string cause =
      network_ == nullptr ? std::string() : network_->failure();
  if (!cause.empty()) {
    throw DeviceError(cause);
  }
  throw DeviceError(concat(
      device_.name(), " has waited ", timeout_.count(), " ms for ", what));
}

bool DevicesSettingUp::happens(
    Device::Event event, steady_clock::time_point limit) const {
  while (!device_.happened(event)) {
    const bool over = group_.failure() != nullptr ||
                      (network_ != nullptr && !network_->failure().empty());
    if (over || steady_clock::now() > limit) {
      return false;
    }
    std::this_thread::sleep_for(kPoll);
  }
  return true;
}

DevicesSettingUp::~DevicesSettingUp() {
  Device::Stream stream = made_.stream;  // null: the caller has it
  bool through = true;
  if (stream != nullptr && event_ != nullptr) {
    if (network_ != nullptr) {
      network_->abort();
    }
    try {
      device_.record(event_, stream);
      through = false;
      const auto limit = steady_clock::now() + kPatience;
      while (!through && steady_clock::now() < limit) {
        if (made_.memory != nullptr) {
          made_.memory->releaseWaits();
        }
        std::this_thread::sleep_for(kPoll);
        through = device_.happened(event_);
      }
    } catch (const DeviceError& error) {
      log(LogLevel::kInfo, error.what());
      through = false;
    }
  }
  if (!through) {
    log(LogLevel::kWarn,
        concat(
            device_.name(),
            " of group ",
            group_.name(),
            " does not end what was tried on it; its memory is kept"));
    if (made_.memory != nullptr) {
      made_.memory->keepForEver();
    }
  } else {
    device_.free(scratch_);
    device_.freeHost(host_);
  }
  if (event_ != nullptr) {
    device_.destroyEvent(event_);
  }
  if (stream != nullptr) {
    device_.destroyStream(stream);
  }
}

}  // namespace

DeviceSetup setUpDevices(
    Engine& engine,
    Group& group,
    Device& device,
    DeviceNetwork* network,
    milliseconds timeout) {
  DevicesSettingUp setting(engine, group, device, network, timeout);
  return setting.run();
}

}  // namespace automoe
