// SPDX-License-Identifier: Apache-2.0
#include "process_group/peer_all_to_all.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/tensor.h>
#include <c10/util/Exception.h>

#include <memory>
#include <utility>
#include <vector>

#include "process_group/device_groups.hpp"
#include "process_group/work_device.hpp"

namespace automoe {
namespace {

using std::chrono::milliseconds;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

/// NCCL says what is wrong with other tensors.
bool isPlain(const at::Tensor& output, const at::Tensor& input, int size) {
  return input.is_cuda() && output.device() == input.device() &&
         input.is_contiguous() && output.is_contiguous() && input.dim() > 0 &&
         output.scalar_type() == input.scalar_type() &&
         output.nbytes() == input.nbytes() && input.size(0) % size == 0;
}

WorkPtr post(
    const RegisteredGroup& group,
    const DeviceGroup& devices,
    const at::Tensor& output,
    const at::Tensor& input,
    milliseconds timeout) {
  const Topology& topology = group.group->topology();
  const CurrentStreamEvent after = inputsReady(*group.group, input.device());
  auto kept = std::make_shared<KeptTensors>(std::vector{input, output});
  DeviceExchange::Terms terms;
  terms.after = after.get();
  terms.timeout = timeout;
  terms.callbacks = keepingTensors(kept);
  DeviceAllToAllArguments arguments;
  arguments.from = static_cast<const std::byte*>(input.const_data_ptr());
  arguments.to = static_cast<std::byte*>(output.mutable_data_ptr());
  arguments.blockBytes = input.nbytes() / static_cast<size_t>(topology.size());
  DeviceExchange::Call call =
      devices.exchange()->allToAll(arguments, std::move(terms));
  return c10::make_intrusive<WorkDevice>(
      topology.rank(),
      input.device(),
      devices.device(),
      std::move(call),
      std::vector{output},
      std::move(kept));
}

/// Seconds of one call, where several follow each other.
template <typename Call>
double secondsOf(c10::Device device, const Call& call) {
  using Clock = std::chrono::steady_clock;
  constexpr int kWarm = 2;
  constexpr int kTimed = 8;
  const c10::Stream stream = currentStreamOf(device);
  for (int i = 0; i < kWarm; ++i) {
    call()->wait();
  }
  stream.synchronize();
  const auto begin = Clock::now();
  for (int i = 0; i < kTimed; ++i) {
    call()->wait();
  }
  stream.synchronize();
  return std::chrono::duration<double>(Clock::now() - begin).count() / kTimed;
}

/// Of all ranks, by NCCL. Collective.
std::vector<double> greatest(
    c10d::Backend& nccl, c10::Device device, const std::vector<double>& own) {
  std::vector<at::Tensor> tensors{at::tensor(own, at::kDouble).to(device)};
  c10d::AllreduceOptions options;
  options.reduceOp = c10d::ReduceOp::MAX;
  nccl.allreduce(tensors, options)->wait();
  const at::Tensor all = tensors.front().cpu();
  const double* data = all.const_data_ptr<double>();
  return {data, data + all.numel()};
}

/// Collective. Nothing is measured where a rank has no memory for it.
PeerChoice measure(
    const RegisteredGroup& group,
    const DeviceGroup& devices,
    c10::Device device,
    milliseconds timeout,
    c10d::Backend& nccl) {
  const auto most = static_cast<int64_t>(peerTrialBytes().back());
  at::Tensor input;
  at::Tensor output;
  double full = 0;
  try {
    const auto kind = at::TensorOptions(at::kByte).device(device);
    input = at::empty({most}, kind);
    output = at::empty({most}, kind);
  } catch (const c10::OutOfMemoryError&) {
    full = 1;
  }
  if (greatest(nccl, device, {full}).front() > 0) {
    return {};
  }
  // Whole rows of the same size for each rank, so somewhat less than `bytes`.
  const auto rows = [&](const at::Tensor& tensor, uint64_t bytes) {
    const int64_t size = group.group->topology().size();
    return tensor.narrow(0, 0, static_cast<int64_t>(bytes) / size * size);
  };
  PeerTrial trial;
  trial.peers = [&](uint64_t bytes) {
    return secondsOf(device, [&] {
      return post(
          group, devices, rows(output, bytes), rows(input, bytes), timeout);
    });
  };
  trial.network = [&](uint64_t bytes) {
    std::vector<int64_t> splits;
    at::Tensor from = rows(input, bytes);
    at::Tensor to = rows(output, bytes);
    return secondsOf(
        device, [&] { return nccl.alltoall_base(to, from, splits, splits); });
  };
  trial.slowest = [&](const std::vector<double>& own) {
    return greatest(nccl, device, own);
  };
  return measurePeers(trial);
}

/// As measured, at the first call. Graphs keep to NCCL: what holds for their
/// replays with memory of the node (all ranks make the same ones, and leave
/// after them) is for those to accept who ask for it by a number of bytes.
bool isFaster(
    const RegisteredGroup& group,
    DeviceGroup& devices,
    const at::Tensor& input,
    milliseconds timeout,
    c10d::Backend& nccl) {
  std::optional<PeerChoice> choice = devices.peerChoice();
  if (!choice.has_value()) {
    choice = measure(group, devices, input.device(), timeout, nccl);
    devices.setPeerChoice(*choice);
  }
  return choice->peers(input.nbytes());
}

}  // namespace

WorkPtr tryPeerAllToAll(
    const RegisteredGroup& group,
    const at::Tensor& output,
    const at::Tensor& input,
    milliseconds timeout,
    c10d::Backend* nccl) {
  const Topology& topology = group.group->topology();
  const std::optional<uint64_t> most = group.options->peerAllToAll;
  if (topology.numNodes() > 1 || !isPlain(output, input, topology.size()) ||
      input.nbytes() > most.value_or(PeerChoice::kMostBytes)) {
    return nullptr;
  }
  const c10::Device device = input.device();
  if (!most.has_value() &&
      (topology.size() == 1 || nccl == nullptr || isCapturing(device))) {
    return nullptr;
  }
  const auto devices = deviceGroupOf(group, device.index());
  if (devices->exchange() == nullptr) {
    return nullptr;
  }
  devices->checkOrdinal(device);
  if (!most.has_value() && !isFaster(group, *devices, input, timeout, *nccl)) {
    return nullptr;
  }
  return post(group, *devices, output, input, timeout);
}

}  // namespace automoe
