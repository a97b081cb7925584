// SPDX-License-Identifier: Apache-2.0
#include "process_group/process_group_automoe.hpp"

#include <c10/core/ScalarType.h>
#include <pthread.h>

#include <mutex>
#include <utility>

#include "process_group/exchange/discovery.hpp"
#include "process_group/group_registry.hpp"
#include "process_group/inner_work.hpp"
#include "process_group/torch_store.hpp"
#include "process_group/work_automoe.hpp"

namespace automoe {
namespace {

using std::chrono::milliseconds;

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

const char* dtypeName(uint8_t dtype) {
  return c10::toString(static_cast<c10::ScalarType>(dtype));
}

[[noreturn]] void rethrow() {
  throwForTorch(std::current_exception());
}

void checkTensor(const char* call, const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(
      tensor.device().is_cpu(),
      call,
      ": ",
      name,
      " is on ",
      tensor.device(),
      ", expected cpu: this version moves CPU tensors only");
  TORCH_CHECK(
      tensor.layout() == at::kStrided && tensor.is_contiguous(),
      call,
      ": ",
      name,
      " of shape ",
      tensor.sizes(),
      " and strides ",
      tensor.strides(),
      " is not contiguous; pass ",
      name,
      ".contiguous()");
}

void checkApart(
    const char* call, const at::Tensor& output, const at::Tensor& input) {
  const auto* out = static_cast<const char*>(output.const_data_ptr());
  const auto* in = static_cast<const char*>(input.const_data_ptr());
  TORCH_CHECK(
      output.nbytes() == 0 || input.nbytes() == 0 ||
          out + output.nbytes() <= in || in + input.nbytes() <= out,
      call,
      ": output and input share memory; pass separate tensors");
}

/// Blocks along dimension 0, one per rank.
std::vector<AllToAllArguments::Block> splitBlocks(
    const char* name,
    const at::Tensor& tensor,
    const std::vector<int64_t>& splits,
    int size) {
  TORCH_CHECK(
      tensor.dim() > 0,
      "all_to_all_single: ",
      name,
      " has no dimension to split");
  const int64_t rows = tensor.size(0);
  if (splits.empty()) {
    TORCH_CHECK_VALUE(
        rows % size == 0,
        "all_to_all_single: ",
        name,
        ".size(0) is ",
        rows,
        ", expected a multiple of the group's ",
        size,
        " ranks; or pass ",
        name,
        "_split_sizes");
  } else {
    int64_t sum = 0;
    for (const int64_t split : splits) {
      TORCH_CHECK_VALUE(
          split >= 0,
          "all_to_all_single: ",
          name,
          "_split_sizes holds ",
          split,
          ", expected sizes >= 0");
      sum += split;
    }
    TORCH_CHECK_VALUE(
        splits.size() == static_cast<size_t>(size) && sum == rows,
        "all_to_all_single: ",
        name,
        "_split_sizes has ",
        splits.size(),
        " entries that sum to ",
        sum,
        ", expected ",
        size,
        " that sum to ",
        name,
        ".size(0), ",
        rows);
  }
  const uint64_t rowBytes =
      rows == 0 ? 0 : tensor.nbytes() / static_cast<uint64_t>(rows);
  auto* data = static_cast<std::byte*>(tensor.data_ptr());
  std::vector<AllToAllArguments::Block> blocks;
  for (int rank = 0; rank < size; ++rank) {
    const int64_t count =
        splits.empty() ? rows / size : splits[static_cast<size_t>(rank)];
    const uint64_t bytes = static_cast<uint64_t>(count) * rowBytes;
    blocks.push_back({data, bytes});
    data += bytes;
  }
  return blocks;
}

milliseconds orDefault(
    milliseconds timeout,
    const c10::intrusive_ptr<c10d::Backend::Options>& to) {
  return timeout == c10d::kUnsetTimeout ? to->timeout : timeout;
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
}

ProcessGroupAutoMoe::ProcessGroupAutoMoe(
    const c10::intrusive_ptr<c10d::Store>& store,
    int rank,
    int size,
    milliseconds timeout,
    const std::string& name,
    const std::vector<int>& globalRanks,
    c10::intrusive_ptr<c10d::Backend> inner)
    : Backend(rank, size),
      inner_(std::move(inner)),
      options_(c10::make_intrusive<Options>(kBackendName, timeout)) {
  options_->group_name = name;
  TorchStore adapted(store, timeout);
  try {
    engine_ = processEngine();
    group_ =
        joinGroup(*engine_, adapted, rank, size, name, timeout, globalRanks);
  } catch (const Error&) {
    rethrow();
  }
  registerGroup(name, {engine_, group_, options_});
  init();
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
      group_->leave(milliseconds(0));
    } catch (const std::exception& error) {
      TORCH_WARN("automoe: leaving a group: ", error.what());
    }
  }
}

// ---- ours ----

c10::intrusive_ptr<c10d::Work> ProcessGroupAutoMoe::post(
    AllToAllArguments arguments,
    Tensors inputs,
    Tensors outputs,
    c10d::OpType type,
    milliseconds timeout) {
  calls_ += 1;
  arguments.dtype = static_cast<uint8_t>(inputs.front().scalar_type());
  arguments.elementBytes = static_cast<uint32_t>(inputs.front().element_size());
  arguments.dtypeName = &dtypeName;
  const at::Tensor& rows = inputs.front();
  if (type == c10d::OpType::ALLTOALL_BASE && rows.size(0) > 0) {
    arguments.rowBytes = rows.nbytes() / static_cast<uint64_t>(rows.size(0));
  }
  const std::optional<Tensors> recorded = inputs;
  auto* tensors = new OperationTensors(std::move(inputs), std::move(outputs));
  try {
    tensors->setOperation(group_->allToAll(
        std::move(arguments),
        orDefault(timeout, options_),
        tensors->callbacks()));
  } catch (const Error&) {
    // Nothing was posted, so the engine's share is ours to give back.
    tensors->releaseByCaller();
    tensors->releaseByCaller();
    rethrow();
  }
  return c10::make_intrusive<WorkAutoMoe>(
      rank_, type, "automoe:all_to_all", recorded, engine_, tensors);
}

c10::intrusive_ptr<c10d::Work> ProcessGroupAutoMoe::alltoall_base(
    at::Tensor& output,
    at::Tensor& input,
    std::vector<int64_t>& outputSplitSizes,
    std::vector<int64_t>& inputSplitSizes,
    const c10d::AllToAllOptions& options) {
  checkTensor("all_to_all_single", "output", output);
  checkTensor("all_to_all_single", "input", input);
  TORCH_CHECK_VALUE(
      output.scalar_type() == input.scalar_type(),
      "all_to_all_single: output is ",
      output.scalar_type(),
      ", expected the dtype of input, ",
      input.scalar_type());
  checkApart("all_to_all_single", output, input);
  AllToAllArguments arguments;
  arguments.sends = splitBlocks("input", input, inputSplitSizes, size_);
  arguments.receives = splitBlocks("output", output, outputSplitSizes, size_);
  return post(
      std::move(arguments),
      {input},
      {output},
      c10d::OpType::ALLTOALL_BASE,
      options.timeout);
}

c10::intrusive_ptr<c10d::Work> ProcessGroupAutoMoe::alltoall(
    Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) {
  const auto size = static_cast<size_t>(size_);
  TORCH_CHECK_VALUE(
      outputs.size() == size && inputs.size() == size,
      "all_to_all: got ",
      outputs.size(),
      " output and ",
      inputs.size(),
      " input tensors, expected one for each of ",
      size,
      " ranks");
  AllToAllArguments arguments;
  for (size_t rank = 0; rank < size; ++rank) {
    checkTensor("all_to_all", "output tensor", outputs[rank]);
    checkTensor("all_to_all", "input tensor", inputs[rank]);
    for (const auto& tensor : {outputs[rank], inputs[rank]}) {
      TORCH_CHECK_VALUE(
          tensor.scalar_type() == inputs[0].scalar_type(),
          "all_to_all: tensor ",
          rank,
          " is ",
          tensor.scalar_type(),
          ", expected the dtype of input tensor 0, ",
          inputs[0].scalar_type());
    }
    for (const auto& input : inputs) {
      checkApart("all_to_all", outputs[rank], input);
    }
    const auto block = [](const at::Tensor& tensor) {
      return AllToAllArguments::Block{
          static_cast<std::byte*>(tensor.data_ptr()), tensor.nbytes()};
    };
    arguments.sends.push_back(block(inputs[rank]));
    arguments.receives.push_back(block(outputs[rank]));
  }
  return post(
      std::move(arguments),
      inputs,
      outputs,
      c10d::OpType::ALLTOALL,
      options.timeout);
}

// ---- life ----

void ProcessGroupAutoMoe::setTimeout(milliseconds timeout) {
  options_->timeout = timeout;
  if (inner_ != nullptr) {
    inner_->setTimeout(timeout);
  }
}

void ProcessGroupAutoMoe::abort() {
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
  group_->leave(std::min<milliseconds>(options_->timeout, kDrain));
  if (inner_ != nullptr) {
    inner_->shutdown();
    // Gloo's threads end with the last reference; at interpreter exit they
    // would be too late.
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
