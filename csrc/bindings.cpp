// SPDX-License-Identifier: Apache-2.0
// What Python sees of the C++ side: torch_automoe._C.
#include <pybind11/chrono.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "moe_ops/device_plans.hpp"
#include "moe_ops/operators.hpp"
#include "moe_ops/tensors.hpp"
#include "process_group/device/device_probe.hpp"
#include "process_group/device_groups.hpp"
#include "process_group/flight_recorder.hpp"
#include "process_group/network/interface.hpp"
#include "process_group/process_group_automoe.hpp"

namespace py = pybind11;

namespace {

using automoe::OptionsAutoMoe;
using automoe::ProcessGroupAutoMoe;
using NoGil = py::gil_scoped_release;

c10::intrusive_ptr<ProcessGroupAutoMoe> create(
    const c10::intrusive_ptr<c10d::Store>& store,
    int rank,
    int size,
    const std::string& name,
    const std::vector<int>& globalRanks,
    const c10::intrusive_ptr<OptionsAutoMoe>& options,
    const c10::intrusive_ptr<c10d::Backend>& inner) {
  // Its own: the user may give the same options to several groups.
  return c10::make_intrusive<ProcessGroupAutoMoe>(
      store,
      rank,
      size,
      name,
      globalRanks,
      c10::make_intrusive<OptionsAutoMoe>(*options),
      inner);
}

c10::intrusive_ptr<OptionsAutoMoe> createOptions(
    std::chrono::milliseconds timeout,
    std::optional<bool> mergeRows,
    const std::string& node,
    std::optional<int> maxCtas,
    const std::string& wire,
    std::optional<uint64_t> peerAllToAll) {
  auto options = c10::make_intrusive<OptionsAutoMoe>(timeout);
  options->mergeRows = mergeRows;
  options->node = node;
  options->maxCtas = automoe::checkedMaxCtas(maxCtas);
  options->fp8Wire = automoe::checkedWire(wire);
  options->peerAllToAll = peerAllToAll;
  return options;
}

py::dict describeTopology(const ProcessGroupAutoMoe& group) {
  const automoe::Topology& topology = group.topology();
  std::vector<int> nodes;
  std::vector<int> localRanks;
  for (int rank = 0; rank < topology.size(); ++rank) {
    nodes.push_back(topology.nodeOf(rank));
    localRanks.push_back(topology.localRankOf(rank));
  }
  py::dict result;
  result["rank"] = topology.rank();
  result["num_nodes"] = topology.numNodes();
  result["node_of_rank"] = nodes;
  result["local_rank_of_rank"] = localRanks;
  return result;
}

py::dict describeInterface() {
  const automoe::Interface interface =
      automoe::chooseInterface(automoe::Config::fromEnvironment());
  py::dict result;
  result["name"] = interface.name;
  result["address"] = interface.address;
  result["reason"] = interface.reason;
  return result;
}

py::bytes collectDeviceFacts(
    int rank, bool ncclSharesGpus, const std::string& whyNoDevice) {
  std::string facts;
  {
    const NoGil released;
    facts = automoe::encodeFacts(automoe::collectFacts(
        {.rank = rank,
         .ordinal = -1,
         .ncclSharesGpus = ncclSharesGpus,
         .whyNoDevice = whyNoDevice}));
  }
  return py::bytes(facts);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ side of torch_automoe";
  // Its types are the bases of ours.
  py::module_::import("torch._C._distributed_c10d");

  py::class_<
      OptionsAutoMoe,
      c10::intrusive_ptr<OptionsAutoMoe>,
      c10d::Backend::Options>(m, "Options")
      .def(
          py::init(&createOptions),
          py::kw_only(),
          py::arg("timeout") = kBackendDefaultTimeout,
          py::arg("merge_rows") = std::nullopt,
          py::arg("node") = "",
          py::arg("max_ctas") = std::nullopt,
          py::arg("wire") = "exact",
          py::arg("peer_all_to_all") = std::nullopt)
      .def_readwrite("merge_rows", &OptionsAutoMoe::mergeRows)
      .def_readwrite("node", &OptionsAutoMoe::node)
      .def_property(
          "max_ctas",
          [](const OptionsAutoMoe& it) { return it.maxCtas; },
          [](OptionsAutoMoe& it, std::optional<int> maxCtas) {
            it.maxCtas = automoe::checkedMaxCtas(maxCtas);
          })
      .def_property(
          "wire",
          [](const OptionsAutoMoe& it) { return it.fp8Wire ? "fp8" : "exact"; },
          [](OptionsAutoMoe& it, const std::string& wire) {
            it.fp8Wire = automoe::checkedWire(wire);
          })
      .def_readwrite("peer_all_to_all", &OptionsAutoMoe::peerAllToAll)
      .def(
          "__copy__",
          [](const OptionsAutoMoe& it) {
            return c10::make_intrusive<OptionsAutoMoe>(it);
          })
      .def("__deepcopy__", [](const OptionsAutoMoe& it, const py::dict&) {
        return c10::make_intrusive<OptionsAutoMoe>(it);
      });

  py::class_<
      ProcessGroupAutoMoe,
      c10::intrusive_ptr<ProcessGroupAutoMoe>,
      c10d::Backend>(m, "ProcessGroupAutoMoe")
      .def(
          py::init(&create),
          py::arg("store"),
          py::arg("rank"),
          py::arg("size"),
          py::arg("name"),
          py::arg("global_ranks"),
          py::arg("options"),
          py::arg("inner") = nullptr,
          py::call_guard<NoGil>())
      .def_property_readonly("options", &ProcessGroupAutoMoe::options)
      // c10d calls it on ranks that are in no part of a split.
      .def(
          "perform_nocolor_split",
          [](ProcessGroupAutoMoe&, const py::object&) {})
      .def("topology", &describeTopology)
      .def(
          "explain_exchange",
          &ProcessGroupAutoMoe::explainExchange,
          py::call_guard<NoGil>())
      .def("stats", &ProcessGroupAutoMoe::stats, py::call_guard<NoGil>());

  m.def(
      "shutdown",
      &automoe::shutdownProcess,
      py::arg("timeout"),
      py::call_guard<NoGil>());
  m.def("choose_interface", &describeInterface);
  m.def(
      "device_facts",
      &collectDeviceFacts,
      py::arg("rank"),
      py::arg("nccl_shares_gpus"),
      py::arg("why_no_device"));
  m.def("explain_device", &automoe::explainDevice, py::arg("facts"));
  m.def(
      "explain_devices",
      [](const std::vector<std::string>& facts,
         const std::vector<int>& nodeOfRank) {
        std::vector<std::string> lines =
            automoe::explainDevices(facts, nodeOfRank);
        for (std::string& line : automoe::explainReads(facts, nodeOfRank)) {
          lines.push_back(std::move(line));
        }
        return lines;
      },
      py::arg("facts"),
      py::arg("node_of_rank"));
  m.def(
      "describe_device_group",
      &automoe::describeDeviceGroup,
      py::arg("group_name"),
      py::call_guard<NoGil>());
  m.def(
      "dump_flight_record",
      [](bool stackTraces, bool onlyActive) {
        std::string dump;
        {
          const NoGil released;
          dump =
              automoe::FlightRecorder::instance().dump(stackTraces, onlyActive);
        }
        return py::bytes(dump);
      },
      py::arg("stack_traces") = true,
      py::arg("only_active") = false);

  m.def(
      "route_words",
      [](const at::Tensor& route) {
        return automoe::withTorchErrors(
            [&] { return automoe::routeWords(route); });
      },
      py::arg("route"),
      py::call_guard<NoGil>());
  m.def(
      "refuse",
      &automoe::refuse,
      py::arg("group_name"),
      py::arg("fault"),
      py::call_guard<NoGil>());
  m.def(
      "dispatch_async",
      &automoe::dispatchAsync,
      py::arg("xs"),
      py::arg("topk_weights"),
      py::arg("route"),
      py::arg("receive_index"),
      py::arg("group_name"),
      py::arg("packed") = false,
      py::call_guard<NoGil>());
  m.def(
      "combine_async",
      &automoe::combineAsync,
      py::arg("rows"),
      py::arg("weights"),
      py::arg("scalars"),
      py::arg("route"),
      py::arg("receive_index"),
      py::arg("group_name"),
      py::arg("num_tokens"),
      py::arg("topk"),
      py::arg("packed") = false,
      py::call_guard<NoGil>());
}
