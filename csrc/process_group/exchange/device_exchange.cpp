// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_exchange.hpp"

#include <algorithm>
#include <thread>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"
#include "process_group/exchange/device_moves.hpp"

namespace automoe {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

// How long the host waits without sleeping.
constexpr auto kBusyWait = std::chrono::microseconds(200);
// For a device that does not come to its end any more.
constexpr auto kPatience = std::chrono::seconds(10);
// What has made a network fail is mostly heard of within this.
constexpr auto kNetworkGrace = std::chrono::seconds(1);

const char* dtypeName(uint8_t dtype) {
  return kernels::nameOf(static_cast<kernels::DType>(dtype));
}

}  // namespace

DeviceExchange::DeviceExchange(
    std::shared_ptr<Engine> engine,
    std::shared_ptr<Group> group,
    std::shared_ptr<Device> device,
    std::unique_ptr<DeviceNetwork> network,
    milliseconds timeout)
    : engine_(std::move(engine)),
      group_(std::move(group)),
      device_(std::move(device)),
      network_(std::move(network)),
      timeout_(timeout),
      setup_(
          setUpDevices(*engine_, *group_, *device_, network_.get(), timeout)),
      stream_(setup_.stream),
      memory_(std::move(setup_.memory)),
      lists_(std::make_shared<DeviceListPool>(device_, stream_)),
      planner_(*engine_, *group_, device_, lists_),
      outgoing_(*device_),
      incoming_(*device_),
      turns_(
          *engine_,
          device_,
          {.failed =
               [this] {
                 if (network_ != nullptr) {
                   network_->abort();
                 }
               },
           .release = [this] { memory_->releaseWaits(); },
           .waiting =
               [this, since = steady_clock::time_point::max()]() mutable {
                 checkNetwork(since);
               },
           .replaying = [this] { checkReplays(); }}) {
  group_->onFailure([this] { turns_.fail(); });
}

DeviceExchange::~DeviceExchange() {
  const std::lock_guard lock(mutex_);
  if (!turns_.awaitThrough(deadlineAfter(timeout_)) && !turns_.failed()) {
    group_->abort(concat(
        device_->name(),
        " has not come to the end of its work in ",
        timeout_.count(),
        " ms"));
  }
  const bool through = turns_.end(kPatience);
  group_->onFailure({});
  if (!through) {
    log(LogLevel::kWarn,
        concat(
            device_->name(),
            " of group ",
            group_->name(),
            " has not told the end of its work; its memory is kept"));
    memory_->keepForEver();
    planner_.keepForEver();
    outgoing_.keepForEver();
    incoming_.keepForEver();
    // Whoever frees the lists would wait for the device.
    new std::shared_ptr<DeviceListPool>(lists_);
  }
  if (!turns_.failed()) {
    try {
      memory_->leave(kPatience);
    } catch (const Error& error) {
      log(LogLevel::kInfo,
          concat("devices of group ", group_->name(), ": ", error.what()));
    }
  }
  device_->destroyStream(stream_);
}

void DeviceExchange::checkReplays() {
  const std::optional<int> gone = memory_->releaseWaitsForGone();
  if (gone.has_value()) {
    group_->giveUp(
        concat(
            "rank ",
            *gone,
            " has left its devices in group ",
            group_->name(),
            ", but rank ",
            topology().rank(),
            " still waited for it in a graph; all ranks must replay their "
            "graphs as often before one of them leaves"),
        FailureKind::kPeer);
  }
}

void DeviceExchange::checkNetwork(steady_clock::time_point& since) {
  const std::string failure =
      network_ == nullptr ? std::string() : network_->failure();
  if (failure.empty()) {
    return;
  }
  since = std::min(since, steady_clock::now());
  if (steady_clock::now() - since > kNetworkGrace) {
    group_->abort(failure);
  }
}

std::shared_ptr<const DeviceRoute> DeviceExchange::upload(const Route& route) {
  group_->checkRoute(route);
  if (!route.sumsPerNode()) {
    throw InvalidArgument(
        "plan: with this reduction_map a node cannot send sums, and on devices "
        "every node does; plan without reduction_map");
  }
  try {
    return std::make_shared<DeviceRoute>(
        lists_,
        makeRouteLists(route, topology()),
        device_->isCapturing(stream_));
  } catch (const DeviceError& error) {
    // The others are about to make a call that this rank cannot make.
    group_->abort(error.what());
    throw;
  }
}

void DeviceExchange::setReadRates(std::vector<std::optional<ReadRates>> rates) {
  const std::lock_guard lock(mutex_);
  reads_.rates = std::move(rates);
}

std::vector<std::string> DeviceExchange::describeReads() {
  const std::lock_guard lock(mutex_);
  return automoe::describeReads(reads_.facts, reads_.choices);
}

DeviceExchange::Call DeviceExchange::dispatch(
    std::shared_ptr<const DeviceRoute> lists,
    const DispatchArguments& arguments,
    Terms terms) {
  const DeviceCallFacts facts{
      .plan = lists->lists().fingerprint,
      .dtype = arguments.dtype,
      .rowBytes = rowBytesOf(arguments),
      .weightBytes = arguments.weightBytes,
      .layout = layoutOf(arguments),
      .wire = terms.wire,
      .dtypeName = arguments.dtypeName};
  const DeviceRoute& on = *lists;
  return post(
      OperationKind::kDeviceDispatch,
      std::move(lists),
      facts,
      std::move(terms),
      [&](const DeviceLane& lane) { enqueueDispatch(lane, on, arguments); });
}

DeviceExchange::Call DeviceExchange::combine(
    std::shared_ptr<const DeviceRoute> lists,
    const CombineArguments& arguments,
    Terms terms) {
  const DeviceCallFacts facts{
      .plan = lists->lists().fingerprint,
      .dtype = static_cast<uint8_t>(arguments.dtype),
      .rowBytes = arguments.rowBytes(),
      .weightBytes = static_cast<uint32_t>(arguments.weightBytes()),
      .scalarBytes = static_cast<uint8_t>(arguments.scalarBytes()),
      .dtypeName = &dtypeName};
  const DeviceRoute& on = *lists;
  return post(
      OperationKind::kDeviceCombine,
      std::move(lists),
      facts,
      std::move(terms),
      [&](const DeviceLane& lane) { enqueueCombine(lane, on, arguments); });
}

DeviceExchange::Call DeviceExchange::allToAll(
    const DeviceAllToAllArguments& arguments, Terms terms) {
  AUTOMOE_CHECK(
      topology().numNodes() == 1,
      "devices of ",
      topology().numNodes(),
      " nodes have no memory that all of them read");
  return post(
      OperationKind::kDeviceAllToAll,
      nullptr,
      {.rowBytes = arguments.blockBytes},
      std::move(terms),
      [&](const DeviceLane& lane) { enqueueAllToAll(lane, arguments); });
}

DeviceExchange::Planned DeviceExchange::plan(
    const DevicePlanArguments& arguments, Terms terms) {
  const std::lock_guard lock(planMutex_);
  const AgreedPlan agreed = planner_.agree(arguments, terms.timeout);
  const auto route = std::make_shared<DeviceRoute>(lists_);
  std::exception_ptr refused;
  Call call = post(
      OperationKind::kDevicePlan,
      route,
      {.plan = agreed.turn},
      std::move(terms),
      [&](const DeviceLane& lane) {
        try {
          if (lane.captured && arguments.maxReceiveTokens < 0) {
            throw InvalidArgument(
                "plan: max_recv_tokens is None while a graph is captured, "
                "expected a number of rows: without one the host waits for the "
                "GPU, and a graph has fixed sizes");
          }
          planner_.enqueue(
              lane, arguments, agreed, [this] { awaitOnHost(); }, *route);
        } catch (const InvalidArgument&) {
          refused = std::current_exception();  // on all ranks
        }
      });
  if (refused != nullptr) {
    std::rethrow_exception(refused);
  }
  return {std::move(call), route};
}

DeviceExchange::HostLists DeviceExchange::readBack(const DeviceRoute& route) {
  const std::lock_guard lock(mutex_);
  const auto wait = [this] { awaitOnHost(); };
  const std::vector<int32_t> counts = readCounts(route, wait);
  return {
      readWords(route, topology(), counts, wait),
      offsetsOf(route, topology(), counts)};
}

void DeviceExchange::awaitOnHost() {
  const DeviceEvent here(device_);
  device_->record(here.get(), stream_);
  awaitEvent(here.get(), steady_clock::time_point::max());
  if (const std::exception_ptr failure = group_->failure()) {
    std::rethrow_exception(failure);
  }
}

bool DeviceExchange::awaitEvent(
    Device::Event event, steady_clock::time_point limit) {
  const auto busyUntil = steady_clock::now() + kBusyWait;
  while (!device_->happened(event)) {
    const auto now = steady_clock::now();
    if (now < busyUntil) {
      continue;
    }
    if (group_->failure() != nullptr || now > limit) {
      return false;
    }
    std::this_thread::sleep_for(kBusyWait / 4);
  }
  return true;
}

DeviceExchange::Call DeviceExchange::post(
    OperationKind kind,
    std::shared_ptr<const DeviceRoute> lists,
    DeviceCallFacts facts,
    Terms terms,
    const Enqueue& enqueue) {
  // Held throughout, so that work comes in the order of the calls' numbers.
  const std::lock_guard lock(mutex_);
  const bool captured = begin(terms, lists.get());
  facts.captured = captured;
  facts.fenced = terms.fenced;
  const std::shared_ptr<DeviceTurn> turn = turns_.begin(std::move(lists));
  std::shared_ptr<Operation> operation;
  try {
    operation = group_->deviceCall(
        kind,
        facts,
        turns_.streamsOf(turn),
        terms.timeout,
        std::move(terms.callbacks));
  } catch (...) {
    turns_.drop(*turn);
    throw;
  }
  turns_.posted(*turn, operation);
  if (operation->finished() && operation->error() != nullptr) {
    turns_.drop(*turn);
    std::rethrow_exception(operation->error());
  }
  start(*turn, terms, captured, enqueue);
  return {operation, turn->done(), captured};
}

bool DeviceExchange::begin(const Terms& terms, const DeviceRoute* lists) {
  try {
    if (terms.after != nullptr) {
      // A stream that awaits an event of a capture is in it from then on.
      device_->await(stream_, terms.after);
    }
    const bool captured = device_->isCapturing(stream_);
    const Device::Event copied =
        lists == nullptr ? nullptr : lists->block().copied;
    // Nothing orders a graph behind the copy of lists that are new to it.
    if (captured && copied != nullptr &&
        !awaitEvent(copied, deadlineAfter(terms.timeout)) &&
        group_->failure() == nullptr) {
      throw DeviceError(concat(
          device_->name(),
          " has not copied the lists of a plan that is captured in ",
          terms.timeout.count(),
          " ms; use the plan once before"));
    }
    return captured;
  } catch (const std::exception& error) {
    // The others are about to make a call that this rank cannot make.
    group_->abort(error.what());
    throw;
  }
}

void DeviceExchange::start(
    DeviceTurn& turn,
    const Terms& terms,
    bool captured,
    const Enqueue& enqueue) {
  const bool afterCapture = std::exchange(afterCapture_, captured);
  if (captured && network_ != nullptr) {
    network_->keepForGraphs();
  }
  try {
    const DeviceLane lane{
        *device_,
        stream_,
        *memory_,
        network_.get(),
        outgoing_,
        incoming_,
        topology(),
        terms.timeout,
        terms.maxBlocks,
        // After a capture the same arena may be the next one twice.
        terms.fenced || captured || afterCapture,
        captured,
        terms.wire,
        reads_};
    enqueue(lane);
    device_->record(turn.done()->get(), stream_);
    turns_.enqueued(turn, captured);
  } catch (const std::exception& error) {
    // What has been enqueued may still use the caller's memory.
    try {
      device_->record(turn.done()->get(), stream_);
      turns_.enqueued(turn, captured);
    } catch (const Error&) {
      turns_.lose(turn);
    }
    // Where the group has failed before, this is what came of it.
    group_->abort(error.what());
    if (const std::exception_ptr failure = group_->failure()) {
      std::rethrow_exception(failure);
    }
    throw;
  }
}

}  // namespace automoe
