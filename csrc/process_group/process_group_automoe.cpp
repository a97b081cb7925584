// SPDX-License-Identifier: Apache-2.0
#include "process_group/process_group_automoe.hpp"

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <torch/csrc/distributed/c10d/ParamCommsUtils.hpp>
#include <utility>

#include "process_group/collective_call.hpp"
#include "process_group/device_groups.hpp"
#include "process_group/exchange/discovery.hpp"
#include "process_group/flight_recorder.hpp"
#include "process_group/group_registry.hpp"
#include "process_group/torch_store.hpp"
#include "process_group/work_automoe.hpp"

namespace automoe {
namespace {

using std::chrono::milliseconds;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

// How long a rank that destroys its group waits for what it has posted.
constexpr auto kDrain = std::chrono::seconds(10);

std::mutex engineMutex;
std::shared_ptr<Engine>& engineSlot() {
  // Leaked: threads may use it while the process exits.
  static auto* slot = new std::shared_ptr<Engine>();
  return *slot;
}

// In the child of a fork the engine's thread does not exist.
void markForked() {
  if (engineSlot() != nullptr) {
    engineSlot()->markForked();
  }
  CompletionThread::instance().forked();
}

}  // namespace

std::shared_ptr<Engine> processEngine() {
  const std::lock_guard lock(engineMutex);
  std::shared_ptr<Engine>& engine = engineSlot();
  if (engine == nullptr) {
    engine = std::make_shared<Engine>(Config::fromEnvironment());
    static const int registered =
        ::pthread_atfork(nullptr, nullptr, &markForked);
    TORCH_CHECK(registered == 0, "pthread_atfork failed");
  }
  return engine;
}

void shutdownProcess(milliseconds timeout) {
  std::shared_ptr<Engine> engine;
  {
    const std::lock_guard lock(engineMutex);
    if (engineSlot() != nullptr && engineSlot()->forked()) {
      return;  // it belongs to the parent
    }
    engine = std::exchange(engineSlot(), nullptr);
  }
  if (engine != nullptr) {
    engine->shutdown(timeout);
  }
  CompletionThread::instance().stop();
  FlightRecorder::instance().waitForDump(timeout);
}

ProcessGroupAutoMoe::ProcessGroupAutoMoe(
    const c10::intrusive_ptr<c10d::Store>& store,
    int rank,
    int size,
    const std::string& name,
    const std::vector<int>& globalRanks,
    c10::intrusive_ptr<OptionsAutoMoe> options,
    c10::intrusive_ptr<c10d::Backend> inner)
    : Backend(rank, size),
      inner_(std::move(inner)),
      options_(std::move(options)),
      globalRanks_(globalRanks) {
  options_->group_name = name;
  TorchStore adapted(store, options_->timeout);
  try {
    engine_ = processEngine();
    group_ = joinGroup(
        *engine_,
        adapted,
        rank,
        size,
        name,
        options_->timeout,
        globalRanks,
        {options_->node, options_->mergeRows});
  } catch (const Error&) {
    throwForTorch(std::current_exception());
  }
  registerGroup(name, {engine_, group_, options_});
  init();
  std::vector<uint64_t> ranks;
  for (int member = 0; member < size; ++member) {
    ranks.push_back(static_cast<uint64_t>(globalRankOf(member)));
  }
  FlightRecorder::instance().addGroup(name, ranks);
}

int ProcessGroupAutoMoe::globalRankOf(int rank) const {
  return globalRanks_.empty() ? rank : globalRanks_[static_cast<size_t>(rank)];
}

ProcessGroupAutoMoe::~ProcessGroupAutoMoe() {
  if (engine_->forked()) {
    // Its threads exist in the parent only; a destructor would wait for them.
    (void)inner_.release();
    return;
  }
  unregisterGroup(options_->group_name, group_.get());
  if (!left_) {
    try {
      forgetDeviceGroup(group_.get());
      group_->leave(milliseconds(0));
    } catch (const std::exception& error) {
      TORCH_WARN("automoe: leaving a group: ", error.what());
    }
  }
}

// ---- from a call to its work ----

milliseconds ProcessGroupAutoMoe::orDefault(milliseconds timeout) const {
  return timeout == c10d::kUnsetTimeout ? options_->timeout : timeout;
}

c10d::Backend* ProcessGroupAutoMoe::inner(
    const char* call, const Tensors& tensors) {
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.device().is_cpu()) {
      TORCH_CHECK_VALUE(
          inner_ != nullptr,
          call,
          ": a tensor is on ",
          tensor.device(),
          ", expected cpu: group ",
          group_->name(),
          " has no NCCL group for other devices");
      calls_ += 1;
      return inner_.get();
    }
  }
  return nullptr;
}

WorkPtr ProcessGroupAutoMoe::launchUnrecorded(
    OperationTensors* tensors, const CallInfo& call, const Start& start) {
  if (onCompletionHook_ || !abortHooks_->empty()) {
    tensors->setAfterwards(completionTask(call.type));
  }
  std::shared_ptr<Operation> operation;
  try {
    operation = start(tensors->callbacks());
  } catch (const Error&) {
    const auto error = std::current_exception();
    // Nothing was posted, so the engine's share is ours to give back.
    tensors->releaseByCaller();
    tensors->releaseByCaller();
    if (group_->failure() != nullptr) {
      dumpFlightRecord(globalRankOf(rank_));
    }
    throwForTorch(error);
  }
  const bool pair = c10d::isP2POp(call.type);
  tensors->setRecord(
      FlightRecorder::instance().begin(
          {.group = pg_uid_,
           .description = pg_desc_,
           .title = pair
                        ? pointToPointTitle(
                              call.type == c10d::OpType::SEND, rank_, call.peer)
                        : std::string(call.title),
           .sequence = pair ? messages_.load() : calls_.load(),
           .pointToPoint = pair,
           .inputs = call.inputs,
           .outputs = call.outputs,
           .timeout = options_->timeout}),
      globalRankOf(rank_));
  tensors->setOperation(std::move(operation));
  auto work = c10::make_intrusive<WorkAutoMoe>(
      rank_, call.type, call.title, call.inputs, engine_, tensors);
  const std::lock_guard lock(coalescingMutex_);
  if (coalescing_) {
    coalesced_.push_back(work);
  }
  return work;
}

WorkPtr ProcessGroupAutoMoe::launch(
    OperationTensors* tensors, const CallInfo& call, const Start& start) {
  (c10d::isP2POp(call.type) ? messages_ : calls_) += 1;
  if (!at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION)) {
    return launchUnrecorded(tensors, call, start);
  }
  const auto elements = [](const Tensors& list) {
    int64_t sum = 0;
    for (const at::Tensor& tensor : list) {
      sum += tensor.numel();
    }
    return sum;
  };
  const bool any = !call.inputs.empty();
  const int first = globalRankOf(0);
  const int stride = size_ > 1 ? globalRankOf(1) - first : 1;
  RECORD_PARAM_COMMS_DATA(
      static_cast<int64_t>(calls_.load()),
      std::make_tuple(pg_uid_, pg_desc_),
      call.inputs,
      call.outputs,
      rank_,
      std::string(std::strchr(call.title, ':') + 1),
      elements(call.inputs),
      elements(call.outputs),
      any ? call.inputs.front().scalar_type() : at::kByte,
      call.inputSplits,
      call.outputSplits,
      first,
      stride,
      size_);
  return launchUnrecorded(tensors, call, start);
}

WorkPtr ProcessGroupAutoMoe::post(CollectiveCall call) {
  const CallInfo info{
      call.type(), call.title(), call.inputs(), call.outputs(), {}, {}};
  return launch(call.takeTensors(), info, [&](OperationCallbacks callbacks) {
    return group_->collective(
        call.takeArguments(), call.timeout(), std::move(callbacks));
  });
}

std::function<void(const Operation&)> ProcessGroupAutoMoe::completionTask(
    c10d::OpType type) {
  {
    const std::lock_guard lock(pending_->mutex);
    pending_->count += 1;
  }
  return [type,
          hook = onCompletionHook_,
          abortHooks = abortHooks_,
          pending = pending_](const Operation& operation) {
    if (operation.error() != nullptr) {
      abortHooks->run();
    }
    if (hook) {
      const std::chrono::duration<float> active =
          operation.ended() - operation.begun();
      hook(std::make_shared<c10d::WorkInfo>(
          type,
          operation.sequence(),
          operation.begun(),
          operation.ended(),
          active));
    }
    const std::lock_guard lock(pending->mutex);
    pending->count -= 1;
    pending->changed.notify_all();
  };
}

void ProcessGroupAutoMoe::registerOnCompletionHook(
    std::function<void(std::shared_ptr<c10d::WorkInfo>)>&& hook) {
  TORCH_CHECK(
      onCompletionHook_ == nullptr, "this group has a completion hook already");
  onCompletionHook_ = std::move(hook);
}

void ProcessGroupAutoMoe::waitForPendingWorks() {
  std::unique_lock lock(pending_->mutex);
  pending_->changed.wait(lock, [this] { return pending_->count == 0; });
}

c10::intrusive_ptr<c10d::Backend> ProcessGroupAutoMoe::split(
    const c10::intrusive_ptr<c10d::Store>& store,
    const std::vector<int>& ranks,
    const c10::intrusive_ptr<Options>& options) {
  const auto place = std::find(ranks.begin(), ranks.end(), rank_);
  if (place == ranks.end()) {
    return nullptr;
  }
  auto own = c10::make_intrusive<OptionsAutoMoe>(*options_);
  // Of another backend when a group has several.
  if (const auto* given = dynamic_cast<OptionsAutoMoe*>(options.get())) {
    own->mergeRows = given->mergeRows;
    own->node = given->node;
    own->maxCtas = given->maxCtas;
    own->fp8Wire = given->fp8Wire;
    own->peerAllToAll = given->peerAllToAll;
  }
  std::string name = group_->name() + "/split";
  if (options != nullptr) {
    own->timeout = options->timeout;
    own->group_desc = options->group_desc;
    name = options->group_name.empty() ? name : options->group_name;
  }
  std::vector<int> globalRanks;
  for (const int rank : ranks) {
    checkRoot("split", rank);
    globalRanks.push_back(globalRankOf(rank));
  }
  const bool splitsInner = inner_ != nullptr && inner_->supportsSplitting();
  return c10::make_intrusive<ProcessGroupAutoMoe>(
      store,
      static_cast<int>(place - ranks.begin()),
      static_cast<int>(ranks.size()),
      name,
      globalRanks,
      std::move(own),
      splitsInner ? inner_->split(store, ranks, inner_->getBackendOptions())
                  : nullptr);
}

// ---- life ----

void ProcessGroupAutoMoe::setTimeout(milliseconds timeout) {
  options_->timeout = timeout;
  if (inner_ != nullptr) {
    inner_->setTimeout(timeout);
  }
}

void ProcessGroupAutoMoe::abort() {
  abortHooks_->run();
  group_->abort("abort() was called");
  if (inner_ != nullptr) {
    inner_->abort();
  }
}

void ProcessGroupAutoMoe::shutdown() {
  if (left_.exchange(true)) {
    return;
  }
  unregisterGroup(options_->group_name, group_.get());
  forgetDeviceGroup(group_.get());
  group_->leave(std::min<milliseconds>(options_->timeout, kDrain));
  if (inner_ != nullptr) {
    inner_->shutdown();
    // Its threads, if any, end with the last reference; at interpreter exit
    // they would be too late.
    inner_ = nullptr;
  }
}

c10d::ErrorType ProcessGroupAutoMoe::getError() {
  const std::exception_ptr failure = group_->failure();
  if (failure == nullptr) {
    return c10d::ErrorType::SUCCESS;
  }
  try {
    std::rethrow_exception(failure);
  } catch (const TimeoutError&) {
    return c10d::ErrorType::TIMEOUT;
  } catch (const PeerFailedError&) {
    return c10d::ErrorType::REMOTE_ERROR;
  } catch (const Error&) {
    return c10d::ErrorType::COMM_ERROR;
  }
}

std::string ProcessGroupAutoMoe::explainExchange() {
  const GroupCounters counters = group_->counters();
  const Topology& topology = group_->topology();
  std::string text = concat(
      "all_to_all: ",
      topology.describe(),
      "; ",
      counters.operations,
      " operations. Inside a node: ",
      counters.inlineBlocks,
      " small blocks by mailbox, ",
      counters.readBlocks,
      " read from the sender's tensor, ",
      counters.stagedBlocks,
      " staged through node memory (",
      engine_->describeCopies(),
      ").");
  if (topology.numNodes() > 1) {
    const size_t kilobytes = engine_->config().eagerBytes / 1024;
    text += concat(
        "\nBetween nodes: ",
        counters.packets,
        " packets to a rail peer (blocks for one node of at most ",
        kilobytes,
        " kB together: one message instead of one per rank), ",
        counters.directBlocks,
        " direct blocks (larger ones: straight into the output, once their "
        "rank has posted), ",
        counters.mergedCasts,
        " casts of rows of which many were the same (each crossed once, ",
        counters.mergedBytes / 1024,
        " kB saved; AUTOMOE_MERGE_ROWS=0 switches that off), ",
        counters.castsStreamed,
        " casts of plans and dispatches; ",
        engine_->describeNetwork(),
        ".");
  }
  return text;
}

std::map<std::string, int64_t> ProcessGroupAutoMoe::stats() {
  const GroupCounters group = group_->counters();
  const EngineCounters process = engine_->counters();
  const auto value = [](uint64_t count) { return static_cast<int64_t>(count); };
  return {
      {"operations", value(group.operations)},
      {"packets", value(group.packets)},
      {"relayed_packets", value(group.relayedPackets)},
      {"direct_blocks", value(group.directBlocks)},
      {"inline_blocks", value(group.inlineBlocks)},
      {"read_blocks", value(group.readBlocks)},
      {"staged_blocks", value(group.stagedBlocks)},
      {"casts_streamed", value(group.castsStreamed)},
      {"merged_casts", value(group.mergedCasts)},
      {"merged_bytes", value(group.mergedBytes)},
      {"network_payload_bytes", value(group.networkPayloadBytes)},
      {"network_bytes_sent", value(process.network.bytesSent)},
      {"network_bytes_received", value(process.network.bytesReceived)},
      {"network_messages_sent", value(process.network.messagesSent)},
      {"network_messages_received", value(process.network.messagesReceived)},
      {"wait_us", value(process.waitMicros)},
      {"node_memory_bytes", value(process.nodeMemoryBytes)},
  };
}

}  // namespace automoe
