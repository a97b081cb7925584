// SPDX-License-Identifier: Apache-2.0
#include "moe_ops/all_to_all_exchange.hpp"

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "moe_ops/combine_blocks.hpp"
#include "moe_ops/tensors.hpp"
#include "process_group/exchange/agreement.hpp"
#include "process_group/exchange/token_sums.hpp"

namespace automoe {
namespace {

/// Of what has ended by the time that the caller gets it.
class EndedWork final : public c10d::Work {
 public:
  EndedWork(int rank, std::vector<at::Tensor> outputs)
      : Work(rank, c10d::OpType::ALLTOALL_BASE),
        outputs_(std::move(outputs)),
        future_(c10::make_intrusive<c10::ivalue::Future>(
            c10::ListType::create(c10::TensorType::get()))) {
    finish();
    future_->markCompleted(c10::IValue(outputs_));
  }

  bool wait(std::chrono::milliseconds /*timeout*/) override { return true; }
  void synchronize() override {}
  std::vector<at::Tensor> result() override { return outputs_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    return future_;
  }

 private:
  std::vector<at::Tensor> outputs_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

Topology everyRankANode(const c10d::ProcessGroup& group) {
  std::vector<int64_t> labels(static_cast<size_t>(group.getSize()));
  std::iota(labels.begin(), labels.end(), 0);
  return Topology::fromNodeLabels(labels, group.getRank());
}

int64_t sumOf(const std::vector<int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), int64_t{0});
}

at::Tensor emptyBytes(int64_t count) {
  return emptyList(count, at::kByte);
}

const char* sumDtypeName(uint8_t dtype) {
  return kernels::nameOf(static_cast<kernels::DType>(dtype));
}

std::vector<int64_t> bytesForOthers(
    const Route& route, const DispatchArguments& arguments) {
  std::vector<int64_t> bytes(static_cast<size_t>(route.size()), 0);
  for (int rank = 0; rank < route.size(); ++rank) {
    if (rank != route.rank()) {
      bytes[static_cast<size_t>(rank)] = static_cast<int64_t>(packedBytes(
          route, arguments, route.sendBegin(rank), route.sendBegin(rank + 1)));
    }
  }
  return bytes;
}

at::Tensor packForOthers(
    const Route& route, const DispatchArguments& arguments, int64_t bytes) {
  at::Tensor packed = emptyBytes(bytes);
  std::byte* to = mutableBytesOf(packed);
  for (int rank = 0; rank < route.size(); ++rank) {
    if (rank != route.rank()) {
      const size_t begin = route.sendBegin(rank);
      const size_t end = route.sendBegin(rank + 1);
      packRows(route, arguments, begin, end, to);
      to += packedBytes(route, arguments, begin, end);
    }
  }
  return packed;
}

/// What does not fit in the calls of two ranks, the lower one first; or
/// nothing.
std::string findDisagreement(
    const Record& low, const Record& high, const char* (*dtypeName)(uint8_t)) {
  if (low.operation != high.operation) {
    return concat(
        "it is ",
        nameOf(low.operation),
        " on rank ",
        low.source,
        ", but ",
        nameOf(high.operation),
        " on rank ",
        high.source,
        "; all ranks must call the same collectives in the same order");
  }
  return low.operation == OperationKind::kPlan
             ? std::string()  // the lists say it
             : findRowDisagreement(high, low, dtypeName);
}

/// By the name that this torch has for it: the older one is alltoall_base.
template <typename Group>
c10::intrusive_ptr<c10d::Work> allToAllSingle(
    Group& group,
    at::Tensor& received,
    at::Tensor& send,
    std::vector<int64_t>& receiveBytes,
    std::vector<int64_t>& sendBytes) {
  if constexpr (requires { &Group::all_to_all_single; }) {
    return group.all_to_all_single(received, send, receiveBytes, sendBytes);
  } else {
    return group.alltoall_base(received, send, receiveBytes, sendBytes);
  }
}

}  // namespace

/// What one rank has in mind. Of a fixed size, with the text cut to it.
struct AllToAllExchange::Greeting {
  Record record;
  char fault[408] = {};
  const char* (*dtypeName)(uint8_t) = nullptr;

  static constexpr size_t kBytes = sizeof(record) + sizeof(fault);

  Greeting(OperationKind operation, int rank) {
    record.operation = operation;
    record.source = rank;
  }
  void write(std::byte* to) const {
    std::memcpy(to, &record, sizeof(record));
    std::memcpy(to + sizeof(record), fault, sizeof(fault));
  }
};

AllToAllExchange::AllToAllExchange(c10::intrusive_ptr<c10d::ProcessGroup> group)
    : group_(std::move(group)), topology_(everyRankANode(*group_)) {}

at::Tensor AllToAllExchange::exchange(
    at::Tensor send,
    std::vector<int64_t> sendBytes,
    std::vector<int64_t> receiveBytes) {
  at::Tensor received = emptyBytes(sumOf(receiveBytes));
  const auto work =
      allToAllSingle(*group_, received, send, receiveBytes, sendBytes);
  if (work != nullptr) {
    work->wait();
  }
  return received;
}

std::vector<int64_t> AllToAllExchange::greet(
    const Greeting& own, const std::vector<int64_t>& sendBytes) {
  const auto size = static_cast<size_t>(topology_.size());
  const auto bytes = static_cast<int64_t>(Greeting::kBytes);
  at::Tensor send = emptyBytes(static_cast<int64_t>(size) * bytes);
  for (size_t rank = 0; rank < size; ++rank) {
    Greeting greeting = own;
    greeting.record.sendBytes = static_cast<uint64_t>(sendBytes[rank]);
    greeting.write(mutableBytesOf(send) + rank * Greeting::kBytes);
  }
  const std::vector<int64_t> splits(size, bytes);
  const at::Tensor received = exchange(send, splits, splits);
  // Everyone compares the others with rank 0, so that all say the same.
  std::vector<Record> records;
  std::vector<int64_t> receiveBytes;
  std::string disagreement;
  for (size_t rank = 0; rank < size; ++rank) {
    const std::byte* from = bytesOf(received) + rank * Greeting::kBytes;
    const auto* fault = reinterpret_cast<const char*>(from + sizeof(Record));
    const size_t length = ::strnlen(fault, sizeof(own.fault));
    if (length > 0) {
      throw InvalidArgument(std::string(fault, length));
    }
    records.push_back(parseRecord({from, sizeof(Record)}));
    receiveBytes.push_back(static_cast<int64_t>(records[rank].sendBytes));
    if (disagreement.empty()) {
      disagreement = findDisagreement(records[0], records[rank], own.dtypeName);
    }
  }
  if (!disagreement.empty()) {
    throw InvalidArgument(concat(
        nameOf(own.record.operation),
        " of group ",
        group_->getGroupName(),
        ": ",
        disagreement));
  }
  return receiveBytes;
}

// ---- plan ----

void AllToAllExchange::plan(
    const std::shared_ptr<RouteBuilder>& builder, CallTensors /*tensors*/) {
  const Greeting greeting(OperationKind::kPlan, topology_.rank());
  std::vector<int64_t> sendBytes(static_cast<size_t>(topology_.size()), 0);
  std::string lists;
  for (int rank = 0; rank < topology_.size(); ++rank) {
    const std::string list = builder->listFor(rank);
    sendBytes[static_cast<size_t>(rank)] = static_cast<int64_t>(list.size());
    lists += list;
  }
  const std::vector<int64_t> receiveBytes = greet(greeting, sendBytes);
  at::Tensor send = emptyBytes(static_cast<int64_t>(lists.size()));
  std::memcpy(mutableBytesOf(send), lists.data(), lists.size());
  const at::Tensor received = exchange(send, sendBytes, receiveBytes);
  const std::byte* from = bytesOf(received);
  for (int rank = 0; rank < topology_.size(); ++rank) {
    const auto bytes =
        static_cast<size_t>(receiveBytes[static_cast<size_t>(rank)]);
    builder->add(rank, {from, bytes});
    from += bytes;
  }
}

void AllToAllExchange::refuse(OperationKind kind, const std::string& fault) {
  Greeting greeting(kind, topology_.rank());
  std::memcpy(
      greeting.fault,
      fault.data(),
      std::min(fault.size(), sizeof(greeting.fault) - 1));
  try {
    greet(
        greeting,
        std::vector<int64_t>(static_cast<size_t>(topology_.size()), 0));
  } catch (const InvalidArgument&) {
    // That one has a fault is known; the caller throws its own.
  }
}

// ---- dispatch and combine ----

void AllToAllExchange::checkRoute(const Route& route) const {
  const bool ours = route.size() == topology_.size() &&
                    route.rank() == topology_.rank() &&
                    route.numNodes() == topology_.numNodes();
  if (!ours) {
    throw InvalidArgument(concat(
        "plan: it was made for rank ",
        route.rank(),
        " of ",
        route.size(),
        " on ",
        route.numNodes(),
        " nodes, but this is rank ",
        topology_.rank(),
        " of ",
        topology_.size(),
        " in group ",
        group_->getGroupName(),
        ", where every rank is a node; use a plan with the group that made "
        "it"));
  }
}

AllToAllExchange::WorkPointer AllToAllExchange::finished(
    CallTensors tensors) const {
  return c10::make_intrusive<EndedWork>(
      topology_.rank(), std::move(tensors.outputs));
}

AllToAllExchange::WorkPointer AllToAllExchange::dispatch(
    DispatchArguments arguments, CallTensors tensors) {
  const Route route(arguments.route);
  Greeting greeting(OperationKind::kDispatch, topology_.rank());
  greeting.record.plan = route.fingerprint();
  greeting.record.dtype = arguments.dtype;
  greeting.record.elementBytes = arguments.weightBytes;
  greeting.record.receiveBytes = rowBytesOf(arguments);
  greeting.record.layout = layoutOf(arguments);
  greeting.dtypeName = arguments.dtypeName;
  const std::vector<int64_t> sendBytes = bytesForOthers(route, arguments);
  const std::vector<int64_t> receiveBytes = greet(greeting, sendBytes);
  const at::Tensor send = packForOthers(route, arguments, sumOf(sendBytes));
  clearPadding(arguments);
  moveOwnRows(route, arguments);
  const at::Tensor received = exchange(send, sendBytes, receiveBytes);
  const std::byte* from = bytesOf(received);
  for (int rank = 0; rank < topology_.size(); ++rank) {
    const auto bytes =
        static_cast<size_t>(receiveBytes[static_cast<size_t>(rank)]);
    if (rank != topology_.rank()) {
      unpackRows(
          route,
          arguments,
          route.landBegin(rank),
          route.landBegin(rank + 1),
          {from, bytes});
    }
    from += bytes;
  }
  return finished(std::move(tensors));
}

AllToAllExchange::WorkPointer AllToAllExchange::combine(
    CombineArguments arguments, CallTensors tensors) {
  const Route route(arguments.route);
  Greeting greeting(OperationKind::kCombine, topology_.rank());
  greeting.record.plan = route.fingerprint();
  greeting.record.dtype = static_cast<uint8_t>(arguments.dtype);
  greeting.record.receiveBytes = arguments.rowBytes();
  greeting.record.elementBytes = static_cast<uint32_t>(arguments.weightBytes());
  greeting.record.scalarBytes = static_cast<uint8_t>(arguments.scalarBytes());
  greeting.dtypeName = &sumDtypeName;
  const std::vector<int64_t> sendBytes =
      combineBlockBytes(route, arguments, topology_);
  const std::vector<int64_t> receiveBytes = greet(greeting, sendBytes);
  TokenSums sums(route, arguments);
  at::Tensor send = emptyBytes(sumOf(sendBytes));
  packCombineBlocks(
      route, arguments, topology_, sendBytes, mutableBytesOf(send), sums);
  const at::Tensor received = exchange(send, sendBytes, receiveBytes);
  const std::byte* from = bytesOf(received);
  for (int rank = 0; rank < topology_.size(); ++rank) {
    const auto bytes =
        static_cast<size_t>(receiveBytes[static_cast<size_t>(rank)]);
    takeCombineBlock(rank, {from, bytes}, sums);
    from += bytes;
  }
  sums.advance();
  AUTOMOE_CHECK(sums.done(), "sums of a combine are missing");
  return finished(std::move(tensors));
}

}  // namespace automoe
