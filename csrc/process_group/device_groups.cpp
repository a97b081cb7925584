// SPDX-License-Identifier: Apache-2.0
#include "process_group/device_groups.hpp"

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <utility>

#include "process_group/collective_call.hpp"
#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"
#include "process_group/device/cuda_device.hpp"
#include "process_group/device/device_facts.hpp"
#include "process_group/device/device_probe.hpp"
#include "process_group/exchange/device_agreement.hpp"
#include "process_group/exchange/schedules.hpp"

namespace automoe {
namespace {

using Texts = std::vector<std::string>;

// Of a text that a rank tells; more cannot be meant.
constexpr uint64_t kMostBytes = 1 << 20;

/// Memory of a gather, as long as the engine may use it.
struct Gathered {
  std::string own;
  uint64_t ownBytes = 0;
  std::vector<uint64_t> bytes;
  Texts texts;
};

/// to[r] becomes what rank r gives.
void gatherBlocks(
    const RegisteredGroup& group,
    const std::shared_ptr<Gathered>& memory,
    ConstBlock from,
    const std::vector<Block>& to) {
  ScheduledArguments arguments;
  arguments.schedule = makeAllGather(group.group->topology(), from, to);
  arguments.description.operation = OperationKind::kAllGather;
  arguments.description.dtypeName = &dtypeName;
  arguments.description.reductionName = &reduceOpName;
  for (const Block& block : to) {
    arguments.description.total += block.bytes;
  }
  OperationCallbacks callbacks;
  callbacks.released = [memory] {};
  const auto operation = group.group->collective(
      std::move(arguments), group.options->timeout, std::move(callbacks));
  group.engine->wait(*operation, Engine::Clock::time_point::max());
  if (operation->error() != nullptr) {
    std::rethrow_exception(operation->error());
  }
}

/// What every rank says, by rank. Collective.
Texts gatherTexts(const RegisteredGroup& group, std::string own) {
  const auto size = static_cast<size_t>(group.group->topology().size());
  const auto memory = std::make_shared<Gathered>();
  memory->own = std::move(own);
  memory->ownBytes = memory->own.size();
  memory->bytes.resize(size);
  memory->texts.resize(size);
  std::vector<Block> blocks;
  for (uint64_t& bytes : memory->bytes) {
    blocks.push_back({reinterpret_cast<std::byte*>(&bytes), sizeof(bytes)});
  }
  gatherBlocks(
      group,
      memory,
      {reinterpret_cast<const std::byte*>(&memory->ownBytes), sizeof(uint64_t)},
      blocks);
  for (size_t rank = 0; rank < size; ++rank) {
    if (memory->bytes[rank] > kMostBytes) {
      throw TransportError(concat(
          "rank ", rank, " tells ", memory->bytes[rank], " bytes on devices"));
    }
    std::string& text = memory->texts[rank];
    text.resize(memory->bytes[rank]);
    blocks[rank] = {reinterpret_cast<std::byte*>(text.data()), text.size()};
  }
  gatherBlocks(
      group,
      memory,
      {reinterpret_cast<const std::byte*>(memory->own.data()),
       memory->own.size()},
      blocks);
  return memory->texts;
}

/// The first rank that tells a fault, or nothing.
std::string firstFault(const Texts& faults) {
  for (size_t rank = 0; rank < faults.size(); ++rank) {
    if (!faults[rank].empty()) {
      return concat("rank ", rank, ": ", faults[rank]);
    }
  }
  return "";
}

std::string firstLine(const std::string& text) {
  return text.substr(0, text.find('\n'));
}

/// What `make` fails with, or nothing.
template <typename Make>
std::string faultOf(const Make& make) {
  try {
    make();
    return "";
  } catch (const std::exception& error) {
    // Torch's, too: the others wait to be told.
    return firstLine(error.what());
  }
}

struct Found {
  std::string text;
  std::string obstacle;
  std::vector<std::optional<ReadRates>> rates;  // of node-mates
};

/// Collective.
Found lookAtDevices(const RegisteredGroup& group, int ordinal) {
  const Topology& topology = group.group->topology();
  const DeviceFacts own = collectFacts(
      {.rank = topology.rank(),
       .ordinal = ordinal,
       .ncclSharesGpus = group.engine->config().ncclSharesGpus});
  std::vector<DeviceFacts> facts;
  for (const std::string& text : gatherTexts(group, encodeFacts(own))) {
    facts.push_back(decodeFacts(text));
  }
  std::vector<int> nodes;
  for (int rank = 0; rank < topology.size(); ++rank) {
    nodes.push_back(topology.nodeOf(rank));
  }
  const DeviceChoice choice = choosePath(facts, nodes);
  Found found;
  for (const std::string& line : choice.lines) {
    found.text += line + "\n";
  }
  found.obstacle = choice.obstacle;
  found.rates = assumedRatesOfMates(facts, nodes, topology.rank());
  return found;
}

/// Collective. An exchange, or why there is none, on every rank.
struct Made {
  std::shared_ptr<Device> device;
  std::unique_ptr<DeviceExchange> exchange;
  std::string obstacle;
};

/// What rank 0 has made. Collective, as is the agreement.
NcclId agreeOnNcclId(
    const RegisteredGroup& group,
    DeviceAgreement& agreement,
    const NcclFunctions& functions) {
  NcclId id = {};
  std::string own;
  agreement.take([&] {
    if (group.group->topology().rank() == 0) {
      id = makeNcclId(functions);
      own.assign(reinterpret_cast<const char*>(id.data()), id.size());
    }
  });
  const std::string made = gatherTexts(group, std::move(own))[0];
  AUTOMOE_CHECK(
      made.size() == id.size(),
      "rank 0 tells an NCCL identifier of ",
      made.size(),
      " bytes, expected ",
      id.size());
  std::memcpy(id.data(), made.data(), id.size());
  return id;
}

NcclNetwork::Terms termsOf(
    const RegisteredGroup& group, const NcclLibrary& library) {
  NcclNetwork::Terms terms;
  terms.timeout = group.options->timeout;
  terms.maxCtas = group.options->maxCtas.value_or(0);
  if (terms.maxCtas > 0 && library.version < 21700) {
    log(LogLevel::kWarn,
        concat(
            "max_ctas does not limit NCCL ",
            ncclVersionText(library.version),
            " between nodes; NCCL >= 2.17 is needed for that"));
  }
  return terms;
}

std::vector<int> othersOf(const Topology& topology) {
  std::vector<int> others;
  for (int rank = 0; rank < topology.size(); ++rank) {
    if (rank != topology.rank()) {
      others.push_back(rank);
    }
  }
  return others;
}

/// Of all nodes; null where there is one node. Collective. Throws DeviceError,
/// on all ranks alike.
std::unique_ptr<DeviceNetwork> makeNetwork(
    const RegisteredGroup& group, int ordinal) {
  const Topology& topology = group.group->topology();
  if (topology.numNodes() == 1) {
    return nullptr;
  }
  const NcclLibrary library = openNccl();
  DeviceAgreement agreement(
      *group.engine, *group.group, group.options->timeout);
  const NcclId id = agreeOnNcclId(group, agreement, library.functions);
  NcclNetwork::Terms terms = termsOf(group, library);
  std::atomic<bool> givenUp = false;
  terms.givenUp = [&givenUp] { return givenUp.load(); };
  std::unique_ptr<DeviceNetwork> network;
  try {
    // A rank where NCCL fails is not waited for by the others.
    agreement.takeWith(
        othersOf(topology),
        [&] {
          network = makeCudaNetwork(
              ordinal,
              library.functions,
              id,
              {topology.rank(), topology.size()},
              terms);
        },
        [&] { givenUp = true; });
  } catch (const std::exception&) {
    if (network != nullptr) {
      network->abort();
    }
    throw;
  }
  return network;
}

Made makeExchange(const RegisteredGroup& group, int ordinal) {
  Made made;
  std::string fault = faultOf([&] {
    CudaDeviceResult result = makeCudaDevice(ordinal);
    if (result.device == nullptr) {
      throw DeviceError(result.reason);
    }
    made.device = std::move(result.device);
    // torch's cache may hold what an arena needs.
    made.device->setMemoryHook(
        [] { at::getDeviceAllocator(c10::kCUDA)->emptyCache(); });
  });
  // A rank without goes no further with the others, nor they without it.
  made.obstacle = firstFault(gatherTexts(group, std::move(fault)));
  if (!made.obstacle.empty()) {
    return made;
  }
  std::unique_ptr<DeviceNetwork> network;
  try {
    network = makeNetwork(group, ordinal);
  } catch (const DeviceError& error) {
    made.obstacle = firstLine(error.what());
    return made;
  }
  fault = faultOf([&] {
    made.exchange = std::make_unique<DeviceExchange>(
        group.engine,
        group.group,
        made.device,
        std::move(network),
        group.options->timeout);
  });
  made.obstacle = firstFault(gatherTexts(group, std::move(fault)));
  if (!made.obstacle.empty()) {
    made.exchange.reset();
  }
  return made;
}

/// A place for the devices of one group; its mutex is held while they are made.
struct Place {
  std::mutex mutex;
  std::shared_ptr<DeviceGroup> devices;
};

struct Places {
  std::mutex mutex;
  std::map<const Group*, std::shared_ptr<Place>> all;
};

Places& places() {
  // Leaked: groups may be destroyed while the process exits.
  static auto* places = new Places();
  return *places;
}

}  // namespace

DeviceGroup::DeviceGroup(const RegisteredGroup& group, int ordinal)
    : ordinal_(ordinal) {
  Found found = lookAtDevices(group, ordinal);
  text_ = std::move(found.text);
  if (found.obstacle.empty()) {
    Made made = makeExchange(group, ordinal);
    device_ = std::move(made.device);
    exchange_ = std::move(made.exchange);
    if (exchange_ != nullptr) {
      exchange_->setReadRates(std::move(found.rates));
    }
    found.obstacle = std::move(made.obstacle);
  }
  const std::string outcome =
      exchange_ != nullptr
          ? "CUDA tensors go between the GPUs themselves"
          : "CUDA tensors are staged through the host: " + found.obstacle;
  text_ += outcome;
  if (exchange_ == nullptr && group.group->topology().rank() == 0) {
    log(LogLevel::kWarn, concat("group ", group.group->name(), ": ", outcome));
  }
}

DeviceGroup::~DeviceGroup() {
  const DeviceExchange* ended = exchange_.get();
  exchange_.reset();
  KnownRoutes::instance().forget(ended);
}

std::string DeviceGroup::text() const {
  const auto choice = peerChoice();
  return choice.has_value() ? concat(
                                  text_,
                                  "\nall_to_all_single without split sizes, by "
                                  "bytes of a rank's input: ",
                                  choice->text())
                            : text_;
}

std::optional<PeerChoice> DeviceGroup::peerChoice() const {
  const std::lock_guard lock(choiceMutex_);
  return peerChoice_;
}

void DeviceGroup::setPeerChoice(PeerChoice choice) {
  const std::lock_guard lock(choiceMutex_);
  peerChoice_ = std::move(choice);
}

void DeviceGroup::checkOrdinal(c10::Device device) const {
  TORCH_CHECK_VALUE(
      ordinal_ == device.index(),
      "tensors are on ",
      device,
      ", expected cuda:",
      ordinal_,
      ", which this rank has used in the group before; use one device per rank "
      "and group");
}

std::shared_ptr<const DeviceRoute> DeviceGroup::listsOf(
    const KnownRoute& route, const at::Tensor& words) {
  return route.lists->of(exchange_.get(), [&] {
    const std::span<const int32_t> span(
        words.const_data_ptr<int32_t>(), static_cast<size_t>(words.numel()));
    return exchange_->upload(Route(span));
  });
}

std::shared_ptr<DeviceGroup> deviceGroupOf(
    const RegisteredGroup& group, int ordinal) {
  std::shared_ptr<Place> place;
  {
    const std::lock_guard lock(places().mutex);
    auto& found = places().all[group.group.get()];
    if (found == nullptr) {
      found = std::make_shared<Place>();
    }
    place = found;
  }
  const std::lock_guard lock(place->mutex);
  if (place->devices == nullptr) {
    place->devices = std::make_shared<DeviceGroup>(group, ordinal);
  }
  return place->devices;
}

void forgetDeviceGroup(const Group* group) {
  std::shared_ptr<Place> place;
  {
    const std::lock_guard lock(places().mutex);
    const auto found = places().all.find(group);
    if (found == places().all.end()) {
      return;
    }
    place = std::move(found->second);
    places().all.erase(found);
  }
  const std::lock_guard lock(place->mutex);
  place->devices.reset();
}

std::string describeDeviceGroup(const std::string& groupName) {
  const std::optional<RegisteredGroup> group = findGroup(groupName);
  TORCH_CHECK_VALUE(
      group.has_value(),
      "group_name is '",
      groupName,
      "', expected the name of a group of the backend automoe");
  std::shared_ptr<Place> place;
  {
    const std::lock_guard lock(places().mutex);
    const auto found = places().all.find(group->group.get());
    place = found == places().all.end() ? nullptr : found->second;
  }
  if (place == nullptr) {
    return "no CUDA tensors have gone through this group yet";
  }
  const std::lock_guard lock(place->mutex);
  return place->devices == nullptr
             ? "the ranks have not found out about their devices yet"
             : place->devices->text();
}

}  // namespace automoe
