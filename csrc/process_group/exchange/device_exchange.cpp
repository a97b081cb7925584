// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_exchange.hpp"

#include <algorithm>
#include <utility>

#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"
#include "process_group/exchange/device_moves.hpp"

namespace automoe {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;

constexpr auto kPoll = milliseconds(1);
// For a device that does not come to its end any more.
constexpr auto kPatience = std::chrono::seconds(10);

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
      stream_(device_->makeStream()),
      lists_(std::make_shared<DeviceListPool>(device_, stream_)),
      outgoing_(*device_),
      incoming_(*device_) {
  const auto mates = static_cast<size_t>(topology().localSize());
  AUTOMOE_CHECK(
      mates < kernels::RowBases::kMost,
      "a node of ",
      mates,
      " ranks has more devices than the ",
      kernels::RowBases::kMost - 1,
      " that a kernel can read from");
  AUTOMOE_CHECK(
      network_ != nullptr || topology().numNodes() == 1,
      "devices of several nodes need a network");
  memory_.emplace(*engine_, *group_, *device_, stream_, timeout);
}

DeviceExchange::~DeviceExchange() {
  const std::lock_guard lock(mutex_);
  const auto limit = deadlineAfter(timeout_);
  while (!failed_ && !letGo()) {
    if (steady_clock::now() > limit) {
      group_->abort(concat(
          device_->name(),
          " has not come to the end of its work in ",
          timeout_.count(),
          " ms"));
      fail();
    }
    std::this_thread::sleep_for(kPoll);
  }
  ending_ = true;
  std::thread releaser;
  {
    const std::lock_guard turns(turnsMutex_);
    releaser = std::move(releaser_);
  }
  if (releaser.joinable()) {
    releaser.join();
  }
  if (!failed_) {
    try {
      memory_->leave(kPatience);
    } catch (const Error& error) {
      log(LogLevel::kInfo,
          concat("devices of group ", group_->name(), ": ", error.what()));
    }
  }
  device_->destroyStream(stream_);
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
        lists_, makeRouteLists(route, topology()));
  } catch (const DeviceError& error) {
    // The others are about to make a call that this rank cannot make.
    group_->abort(error.what());
    throw;
  }
}

DeviceExchange::Call DeviceExchange::dispatch(
    std::shared_ptr<const DeviceRoute> lists,
    const Route& route,
    const DispatchArguments& arguments,
    Terms terms) {
  const DeviceCallFacts facts{
      .plan = route.fingerprint(),
      .dtype = arguments.dtype,
      .rowBytes = rowBytesOf(arguments),
      .weightBytes = arguments.weightBytes,
      .layout = layoutOf(arguments),
      .dtypeName = arguments.dtypeName};
  const DeviceRoute& on = *lists;
  return post(
      OperationKind::kDeviceDispatch,
      std::move(lists),
      facts,
      std::move(terms),
      [&](const DeviceLane& lane) {
        enqueueDispatch(lane, on, route, arguments);
      });
}

DeviceExchange::Call DeviceExchange::combine(
    std::shared_ptr<const DeviceRoute> lists,
    const Route& route,
    const CombineArguments& arguments,
    Terms terms) {
  const DeviceCallFacts facts{
      .plan = route.fingerprint(),
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
      [&](const DeviceLane& lane) {
        enqueueCombine(lane, on, route, arguments);
      });
}

DeviceExchange::Call DeviceExchange::post(
    OperationKind kind,
    std::shared_ptr<const DeviceRoute> lists,
    const DeviceCallFacts& facts,
    Terms terms,
    const Enqueue& enqueue) {
  // Held throughout, so that work comes in the order of the calls' numbers.
  const std::lock_guard lock(mutex_);
  forgetEnded();
  const auto turn = std::make_shared<Turn>();
  turn->done = std::make_shared<DeviceEvent>(device_);
  turn->lists = std::move(lists);
  {
    const std::lock_guard turns(turnsMutex_);
    turns_.push_back(turn);
  }
  DeviceStreams streams;
  streams.happened = [this, turn] {
    const Turn::State state = turn->state;
    return state == Turn::State::kCaptured ||
           (state == Turn::State::kEnqueued &&
            device_->happened(turn->done->get()));
  };
  streams.failed = [this, turn] {
    {
      const std::lock_guard turns(turnsMutex_);
      turn->pinned = true;
    }
    fail();
  };
  std::shared_ptr<Operation> operation;
  try {
    operation = group_->deviceCall(
        kind,
        facts,
        std::move(streams),
        terms.timeout,
        std::move(terms.callbacks));
  } catch (...) {
    turn->state = Turn::State::kDropped;
    throw;
  }
  {
    const std::lock_guard turns(turnsMutex_);
    turn->operation = operation;
  }
  if (operation->finished() && operation->error() != nullptr) {
    turn->state = Turn::State::kDropped;
    std::rethrow_exception(operation->error());
  }
  start(*turn, terms, enqueue);
  return {operation, turn->done};
}

void DeviceExchange::start(
    Turn& turn, const Terms& terms, const Enqueue& enqueue) {
  try {
    if (terms.after != nullptr) {
      device_->await(stream_, terms.after);
    }
    const bool captured = device_->isCapturing(stream_);
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
        terms.fenced || captured};
    enqueue(lane);
    device_->record(turn.done->get(), stream_);
    if (captured) {
      captured_.push_back(turn.lists);
    }
    turn.state = captured ? Turn::State::kCaptured : Turn::State::kEnqueued;
  } catch (const std::exception& error) {
    // What has been enqueued may still use the caller's memory.
    try {
      device_->record(turn.done->get(), stream_);
      turn.state = Turn::State::kEnqueued;
    } catch (const Error&) {
      turn.state = Turn::State::kDropped;
    }
    // Where the group has failed before, this is what came of it.
    group_->abort(error.what());
    if (const std::exception_ptr failure = group_->failure()) {
      std::rethrow_exception(failure);
    }
    throw;
  }
}

bool DeviceExchange::ended(const Turn& turn) const {
  // While its operation lasts, that one may ask the turn.
  return through(turn) &&
         (turn.operation == nullptr || turn.operation->finished());
}

bool DeviceExchange::through(const Turn& turn) const {
  switch (turn.state.load()) {
    case Turn::State::kPosting:
      return false;
    case Turn::State::kCaptured:
    case Turn::State::kDropped:
      return true;
    case Turn::State::kEnqueued:
      break;
  }
  try {
    return device_->happened(turn.done->get());
  } catch (const DeviceError&) {
    return true;  // it does nothing any more
  }
}

void DeviceExchange::forgetEnded() {
  const std::lock_guard turns(turnsMutex_);
  while (!turns_.empty() && !turns_.front()->pinned && ended(*turns_.front())) {
    turns_.pop_front();
  }
}

// ---- after a failure ----

void DeviceExchange::fail() {
  const std::lock_guard turns(turnsMutex_);
  if (!failed_.exchange(true)) {
    releaser_ = std::thread([this] { releaseUntilThrough(); });
  }
}

void DeviceExchange::releaseUntilThrough() {
  if (network_ != nullptr) {
    network_->abort();
  }
  auto limit = steady_clock::time_point::max();
  while (!letGo()) {
    // Again and again: whoever waited for a flag clears it, and the next one on
    // the stream may wait for the same.
    memory_->releaseWaits();
    std::this_thread::sleep_for(kPoll);
    if (ending_ && limit == steady_clock::time_point::max()) {
      limit = steady_clock::now() + kPatience;
    }
    if (steady_clock::now() > limit) {
      log(LogLevel::kWarn,
          concat(
              device_->name(), " does not end its work; its memory is kept"));
      return;
    }
  }
}

bool DeviceExchange::letGo() {
  std::vector<std::shared_ptr<Operation>> pinned;
  bool all = true;
  {
    const std::lock_guard turns(turnsMutex_);
    std::erase_if(turns_, [&](const std::shared_ptr<Turn>& turn) {
      if (!ended(*turn)) {
        all = false;
        return false;
      }
      if (turn->pinned && turn->operation != nullptr) {
        pinned.push_back(turn->operation);
      }
      return true;
    });
  }
  const std::lock_guard lock(engine_->mutex());
  for (const auto& operation : pinned) {
    operation->unpin();
  }
  return all;
}

}  // namespace automoe
