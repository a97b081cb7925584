// SPDX-License-Identifier: Apache-2.0
// Messages and barriers of ProcessGroupAutoMoe, and calls that are made as one.
#include <utility>

#include "process_group/coalesced_work.hpp"
#include "process_group/collective_call.hpp"
#include "process_group/process_group_automoe.hpp"

namespace automoe {

using c10d::OpType;
using std::chrono::milliseconds;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

namespace {

// Tags of c10d are ints; this one is not.
constexpr uint64_t kBarrierTag = uint64_t{1} << 32;

}  // namespace

// ---- point to point ----

WorkPtr ProcessGroupAutoMoe::postPair(
    bool sends,
    const char* title,
    OpType type,
    Tensors& tensors,
    int peer,
    int tag) {
  CollectiveCall call(title, type, OperationKind::kPair, options_->timeout);
  TORCH_CHECK_VALUE(
      tensors.size() == 1,
      call.name(),
      ": got ",
      tensors.size(),
      " tensors, expected one");
  TORCH_CHECK_VALUE(
      tag >= 0, call.name(), ": tag is ", tag, ", expected a number >= 0");
  const at::Tensor& tensor = tensors.front();
  PairArguments arguments;
  if (sends) {
    const ConstBlock block = call.input(tensor);
    arguments.data = const_cast<std::byte*>(block.data);
    arguments.bytes = block.bytes;
  } else {
    const Block block = call.output(tensor);
    arguments.data = block.data;
    arguments.bytes = block.bytes;
  }
  arguments.peer = peer;
  arguments.tag = static_cast<uint64_t>(tag);
  arguments.dtype = static_cast<uint8_t>(tensor.scalar_type());
  arguments.dtypeName = &dtypeName;
  const auto start = [&](OperationCallbacks callbacks) {
    return sends ? group_->send(arguments, call.timeout(), std::move(callbacks))
                 : group_->receive(
                       arguments, call.timeout(), std::move(callbacks));
  };
  return launch(
      call.takeTensors(), {type, title, tensors, tensors, {}, {}, peer}, start);
}

WorkPtr ProcessGroupAutoMoe::send(Tensors& tensors, int destination, int tag) {
  if (auto* device = inner("send", tensors)) {
    return device->send(tensors, destination, tag);
  }
  return postPair(
      true, "automoe:send", OpType::SEND, tensors, destination, tag);
}

WorkPtr ProcessGroupAutoMoe::recv(Tensors& tensors, int source, int tag) {
  if (auto* device = inner("recv", tensors)) {
    return device->recv(tensors, source, tag);
  }
  // Not the number that stands for any rank.
  TORCH_CHECK_VALUE(
      source >= 0, "recv: src is ", source, ", expected a rank of the group");
  return postPair(false, "automoe:recv", OpType::RECV, tensors, source, tag);
}

WorkPtr ProcessGroupAutoMoe::recvAnysource(Tensors& tensors, int tag) {
  if (auto* device = inner("recv", tensors)) {
    return device->recvAnysource(tensors, tag);
  }
  return postPair(
      false,
      "automoe:recvAnySource",
      OpType::RECVANYSOURCE,
      tensors,
      PairArguments::kAnySource,
      tag);
}

// ---- barriers ----

WorkPtr ProcessGroupAutoMoe::barrier(const c10d::BarrierOptions& options) {
  if (inner_ != nullptr && options.device.has_value() &&
      !options.device->is_cpu()) {
    return inner_->barrier(options);
  }
  CollectiveCall call(
      "automoe:barrier",
      OpType::BARRIER,
      OperationKind::kBarrier,
      orDefault(options.timeout));
  call.setSchedule(makeBarrier(topology()));
  return post(std::move(call));
}

// A message without bytes to or from each rank. Texts are those of Gloo, which
// users and their tools know.
void ProcessGroupAutoMoe::monitoredBarrier(
    const c10d::BarrierOptions& options, bool waitAllRanks) {
  calls_ += 1;
  const milliseconds timeout = orDefault(options.timeout);
  if (rank_ == 0) {
    passBarrierAsFirst(timeout, waitAllRanks);
    return;
  }
  try {
    // Rank 0 speaks first when somebody is late.
    awaitMail(postMail(0, true, 2 * timeout));
    awaitMail(postMail(0, false, 2 * timeout));
  } catch (const Error& error) {
    C10_THROW_ERROR(
        DistBackendError,
        concat(
            "Rank ",
            rank_,
            " successfully reached monitoredBarrier, but received errors while "
            "waiting for send/recv from rank 0: ",
            error.what()));
  }
}

void ProcessGroupAutoMoe::passBarrierAsFirst(
    milliseconds timeout, bool waitAllRanks) {
  const auto until = Operation::Clock::now() + timeout;
  std::vector<std::shared_ptr<PairOperation>> arrivals;
  std::vector<int> missing;
  try {
    for (int rank = 1; rank < size_; ++rank) {
      arrivals.push_back(postMail(rank, false, 2 * timeout));
    }
    for (const auto& arrival : arrivals) {
      if (engine_->wait(*arrival, until)) {
        awaitMail(arrival);
      } else if (missing.push_back(arrival->peer()); !waitAllRanks) {
        break;
      }
    }
    if (!missing.empty()) {
      group_->giveUp(
          timeout.count() <= 0
              ? std::string("Rank 0 timed out in monitoredBarrier after 0 ms")
              : concat(
                    missing.size() == 1 ? "Rank " : "Ranks ",
                    c10::Join(", ", missing),
                    " failed to pass monitoredBarrier in ",
                    timeout.count(),
                    " ms"));
      throwForTorch(group_->failure());
    }
    for (int rank = 1; rank < size_; ++rank) {
      awaitMail(postMail(rank, true, 2 * timeout));
    }
  } catch (const Error&) {
    throwForTorch(std::current_exception());
  }
}

std::shared_ptr<PairOperation> ProcessGroupAutoMoe::postMail(
    int peer, bool sends, milliseconds timeout) {
  PairArguments mail;
  mail.peer = peer;
  mail.tag = kBarrierTag;
  // One that is not received in time fails the group; that is for rank 0 to do.
  const milliseconds limit =
      std::max<milliseconds>(timeout, std::chrono::seconds(10));
  return sends ? group_->send(mail, limit, {})
               : group_->receive(mail, limit, {});
}

void ProcessGroupAutoMoe::awaitMail(
    const std::shared_ptr<PairOperation>& operation) {
  engine_->wait(*operation, Operation::Clock::time_point::max());
  if (operation->error() != nullptr) {
    std::rethrow_exception(operation->error());
  }
}

// ---- several as one ----

void ProcessGroupAutoMoe::startCoalescing() {
  if (inner_ != nullptr && inner_->supportsCoalescing()) {
    inner_->startCoalescing();
  }
  const std::lock_guard lock(coalescingMutex_);
  coalescing_ = true;
}

WorkPtr ProcessGroupAutoMoe::endCoalescing() {
  std::vector<WorkPtr> works;
  {
    const std::lock_guard lock(coalescingMutex_);
    coalescing_ = false;
    works = std::exchange(coalesced_, {});
  }
  if (inner_ != nullptr && inner_->supportsCoalescing()) {
    if (auto work = inner_->endCoalescing()) {
      works.push_back(std::move(work));
    }
  }
  return c10::make_intrusive<CoalescedWork>(rank_, std::move(works));
}

WorkPtr ProcessGroupAutoMoe::together(
    Tensors& outputs,
    Tensors& inputs,
    const std::function<WorkPtr(size_t)>& one) {
  TORCH_CHECK_VALUE(
      outputs.size() == inputs.size(),
      "a coalesced call: got ",
      outputs.size(),
      " outputs and ",
      inputs.size(),
      " inputs, expected as many");
  std::vector<WorkPtr> works;
  for (size_t i = 0; i < inputs.size(); ++i) {
    works.push_back(one(i));
  }
  return c10::make_intrusive<CoalescedWork>(rank_, std::move(works));
}

}  // namespace automoe
