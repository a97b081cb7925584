// SPDX-License-Identifier: Apache-2.0
// Which way CUDA tensors take, for machines that are invented here.
#include "process_group/device/device_probe.hpp"

#include <gtest/gtest.h>

#include "process_group/common/error.hpp"
#include "process_group/device/cuda_device.hpp"
#include "process_group/device/nvml.hpp"

namespace automoe {
namespace {

enum class Link { kNvlink, kPcie, kNone, kUnknown };

DeviceUuid uuidOf(int device) {
  DeviceUuid uuid = {};
  uuid[0] = static_cast<uint8_t>(device + 1);
  return uuid;
}

/// A rank on one of the devices of a machine that are linked alike.
DeviceFacts makeFacts(int rank, int device, int devices, Link link) {
  DeviceFacts facts;
  facts.rank = rank;
  facts.ordinal = device;
  facts.name = "NVIDIA H100";
  facts.uuid = uuidOf(device);
  facts.pciBusId = concat("0000:", device, "0:00.0");
  facts.computeMajor = 9;
  facts.flagsSupported = true;
  facts.nvlinks = link == Link::kNvlink ? 18 : 0;
  for (int peer = 0; peer < devices && link != Link::kUnknown; ++peer) {
    if (peer != device) {
      facts.peers.push_back(
          {uuidOf(peer), link != Link::kNone, link == Link::kNvlink});
    }
  }
  facts.ncclVersion = 22705;
  return facts;
}

std::vector<DeviceFacts> makeNode(int devices, Link link) {
  std::vector<DeviceFacts> ranks;
  for (int device = 0; device < devices; ++device) {
    ranks.push_back(makeFacts(device, device, devices, link));
  }
  return ranks;
}

DeviceChoice chooseInNode(const std::vector<DeviceFacts>& ranks) {
  return choosePath(ranks, std::vector<int>(ranks.size(), 0));
}

std::string textOf(const DeviceChoice& choice) {
  std::string text;
  for (const std::string& line : choice.lines) {
    text += line + "\n";
  }
  return text;
}

void expectLine(const DeviceChoice& choice, const std::string& line) {
  EXPECT_NE(("\n" + textOf(choice)).find("\n" + line + "\n"), std::string::npos)
      << "no line '" << line << "' in\n"
      << textOf(choice);
}

TEST(DeviceProbe, EightGpusWithNvlinkShareMemory) {
  const DeviceChoice choice = chooseInNode(makeNode(8, Link::kNvlink));
  EXPECT_TRUE(choice.usable);
  EXPECT_EQ(choice.nodeMemory, std::vector<bool>{true});
  EXPECT_TRUE(choice.nccl);
  expectLine(
      choice,
      "rank 7: NVIDIA H100 (7), compute 9.0, PCI 0000:70:00.0, 18 NVLinks");
  expectLine(
      choice,
      "node 0: NVLink between 28 pairs of ranks: 0-1, 0-2, 0-3, 0-4, 0-5, "
      "0-6 and 22 more");
  expectLine(
      choice, "node 0: ranks 0-7 can read each other's GPU memory (CUDA IPC)");
  expectLine(choice, "NCCL 2.27.5 is there; inside one node, no row needs it");
}

TEST(DeviceProbe, PcieWithPeerAccessSharesMemory) {
  const auto ranks = makeNode(4, Link::kPcie);
  EXPECT_EQ(pairPath(ranks[0], ranks[3]), PairPath::kPcie);
  const DeviceChoice choice = chooseInNode(ranks);
  EXPECT_TRUE(choice.usable);
  EXPECT_EQ(choice.nodeMemory, std::vector<bool>{true});
  expectLine(
      choice,
      "node 0: PCIe P2P between 6 pairs of ranks: 0-1, 0-2, 0-3, 1-2, 1-3, "
      "2-3");
}

TEST(DeviceProbe, WithoutPeerAccessTheHostStages) {
  const DeviceChoice choice = chooseInNode(makeNode(2, Link::kNone));
  EXPECT_FALSE(choice.usable);
  EXPECT_EQ(choice.nodeMemory, std::vector<bool>{false});
  EXPECT_TRUE(choice.nccl);
  expectLine(
      choice,
      "node 0: GPU memory cannot be shared, because there is no peer access "
      "between ranks 0-1");
  EXPECT_EQ(
      choice.obstacle, "on node 0, there is no peer access between ranks 0-1");
  expectLine(
      choice,
      "CUDA tensors are to be staged through the host: on node 0, there is no "
      "peer access between ranks 0-1");
}

TEST(DeviceProbe, OneNodeWithSharedMemoryNeedsNoNccl) {
  auto ranks = makeNode(2, Link::kNvlink);
  ranks[0].ncclVersion = ranks[1].ncclVersion = 0;
  const DeviceChoice choice = chooseInNode(ranks);
  EXPECT_TRUE(choice.usable);
  EXPECT_FALSE(choice.nccl);
}

TEST(DeviceProbe, NodesNeedNcclBetweenThem) {
  auto ranks = makeNode(2, Link::kNvlink);
  const std::vector<int> nodeOf = {0, 1};
  const DeviceChoice with = choosePath(ranks, nodeOf);
  EXPECT_TRUE(with.usable);
  EXPECT_EQ(with.nodeMemory, (std::vector<bool>{true, true}));
  EXPECT_EQ(with.obstacle, "");
  expectLine(with, "NCCL 2.27.5 can carry rows between nodes");
  expectLine(with, "CUDA tensors can go between the GPUs themselves");
  ranks[1].ncclVersion = 0;
  ranks[1].whyNoNccl = "libnccl.so.2 lacks";
  const DeviceChoice without = choosePath(ranks, nodeOf);
  EXPECT_FALSE(without.usable);
  EXPECT_FALSE(without.nccl);
  expectLine(without, "NCCL cannot be used: on rank 1, libnccl.so.2 lacks");
  expectLine(
      without,
      "CUDA tensors are to be staged through the host: NCCL cannot carry rows "
      "between nodes: on rank 1, libnccl.so.2 lacks");
}

TEST(DeviceProbe, RanksWithDifferentNcclDoNotUseIt) {
  auto ranks = makeNode(2, Link::kNone);
  ranks[1].ncclVersion = 23007;
  const DeviceChoice choice = chooseInNode(ranks);
  EXPECT_FALSE(choice.nccl);
  expectLine(
      choice,
      "NCCL cannot be used: ranks 0 and 1 have different versions: 2.27.5 and "
      "2.30.7");
}

TEST(DeviceProbe, RanksThatShareAGpuNeedANewNcclAndItsVariable) {
  std::vector<DeviceFacts> ranks = {
      makeFacts(0, 0, 1, Link::kNone), makeFacts(1, 0, 1, Link::kNone)};
  EXPECT_EQ(pairPath(ranks[0], ranks[1]), PairPath::kSameDevice);
  DeviceChoice choice = chooseInNode(ranks);
  EXPECT_TRUE(choice.usable) << "by CUDA IPC alone";
  EXPECT_FALSE(choice.nccl);
  expectLine(choice, "node 0: same device between 1 pair of ranks: 0-1");
  expectLine(
      choice,
      "NCCL cannot be used: two ranks share a GPU, which needs NCCL >= 2.30.0 "
      "with NCCL_MULTI_RANK_GPU_ENABLE=1, not 2.27.5");

  ranks[0].ncclVersion = ranks[1].ncclVersion = 23007;
  ranks[0].ncclSharesGpus = true;
  choice = chooseInNode(ranks);
  EXPECT_FALSE(choice.nccl);
  expectLine(
      choice,
      "NCCL cannot be used: two ranks share a GPU, which needs "
      "NCCL_MULTI_RANK_GPU_ENABLE=1; it is not set on rank 1");

  ranks[1].ncclSharesGpus = true;
  EXPECT_TRUE(chooseInNode(ranks).nccl);
}

TEST(DeviceProbe, TwoNodesWithOneGpuEachShareNone) {
  // The same device numbers, but other devices.
  std::vector<DeviceFacts> ranks = {
      makeFacts(0, 0, 1, Link::kNone), makeFacts(1, 0, 1, Link::kNone)};
  ranks[1].uuid = uuidOf(5);
  EXPECT_TRUE(choosePath(ranks, std::vector<int>{0, 1}).nccl);
}

TEST(DeviceProbe, ContainersOnOneMachineMayShareAGpu) {
  std::vector<DeviceFacts> ranks = {
      makeFacts(0, 0, 1, Link::kNone), makeFacts(1, 0, 1, Link::kNone)};
  const DeviceChoice choice = choosePath(ranks, std::vector<int>{0, 1});
  EXPECT_FALSE(choice.usable);
  EXPECT_NE(choice.obstacle.find("two ranks share a GPU"), std::string::npos);
}

TEST(DeviceProbe, WithoutDriverTheExchangeRunsOnCpuRanks) {
  std::vector<DeviceFacts> ranks(2);
  ranks[1].rank = 1;
  for (DeviceFacts& facts : ranks) {
    facts.whyNoDevice = "there is no NVIDIA driver";
  }
  const DeviceChoice choice = chooseInNode(ranks);
  EXPECT_FALSE(choice.usable);
  EXPECT_EQ(
      textOf(choice),
      "no CUDA device: there is no NVIDIA driver; the exchange runs on CPU "
      "ranks\n");
  ranks[1].whyNoDevice = "there is no NVIDIA GPU";
  EXPECT_EQ(
      textOf(chooseInNode(ranks)),
      "rank 0: no CUDA device: there is no NVIDIA driver\n"
      "rank 1: no CUDA device: there is no NVIDIA GPU\n"
      "the exchange runs on CPU ranks\n");
}

TEST(DeviceProbe, OneRankAloneTellsWhatItSees) {
  DeviceFacts facts = makeFacts(2, 0, 4, Link::kNvlink);
  facts.peers[2] = {uuidOf(3), false, false};
  EXPECT_EQ(
      explainDevice(encodeFacts(facts)),
      (std::vector<std::string>{
          "rank 2: NVIDIA H100 (0), compute 9.0, PCI 0000:00:00.0, 18 NVLinks",
          "rank 2: NVLink to 2 other GPUs of its machine",
          "rank 2: no P2P to 1 other GPU of its machine",
          "NCCL 2.27.5"}));
  facts.ordinal = -1;
  facts.whyNoDevice = "there is no NVIDIA driver";
  EXPECT_EQ(
      explainDevice(encodeFacts(facts)),
      std::vector<std::string>{
          "no CUDA device: there is no NVIDIA driver; the exchange runs on CPU "
          "ranks"});
}

TEST(DeviceProbe, RanksWithoutDeviceAmongOthersAreNamed) {
  auto ranks = makeNode(6, Link::kNvlink);
  for (const size_t rank : {1, 2, 3, 5}) {
    ranks[rank].ordinal = -1;
    ranks[rank].whyNoDevice = "there is no NVIDIA GPU";
  }
  const DeviceChoice choice = chooseInNode(ranks);
  EXPECT_FALSE(choice.usable);
  expectLine(
      choice,
      "CUDA tensors are to be staged through the host: ranks 1-3, 5 have no "
      "CUDA device");
}

TEST(DeviceProbe, ANodeWithoutPeerAccessIsNamed) {
  // Node 0: NVLink; node 1: PCIe without peer access.
  std::vector<DeviceFacts> ranks = makeNode(2, Link::kNvlink);
  for (int device = 0; device < 2; ++device) {
    DeviceFacts facts = makeFacts(2 + device, 10 + device, 0, Link::kUnknown);
    facts.peers.push_back({uuidOf(11 - device), false, false});
    ranks.push_back(facts);
  }
  const DeviceChoice choice = choosePath(ranks, std::vector<int>{0, 0, 1, 1});
  EXPECT_FALSE(choice.usable);
  EXPECT_EQ(
      choice.obstacle, "on node 1, there is no peer access between ranks 2-3");
  EXPECT_EQ(choice.nodeMemory, (std::vector<bool>{true, false}));
  expectLine(choice, "node 0: NVLink between 1 pair of ranks: 0-1");
  expectLine(choice, "node 1: no P2P between 1 pair of ranks: 2-3");
}

TEST(DeviceProbe, OneWayOfAccessIsNotEnough) {
  auto ranks = makeNode(2, Link::kNvlink);
  ranks[1].peers[0].access = false;
  EXPECT_EQ(pairPath(ranks[0], ranks[1]), PairPath::kNoPeerAccess);
  EXPECT_EQ(pairPath(ranks[1], ranks[0]), PairPath::kNoPeerAccess);
}

TEST(DeviceProbe, WhatNobodySeesIsNotUsed) {
  auto ranks = makeNode(2, Link::kUnknown);
  EXPECT_EQ(pairPath(ranks[0], ranks[1]), PairPath::kUnknown);
  EXPECT_EQ(chooseInNode(ranks).nodeMemory, std::vector<bool>{false});
  // One of the two is enough to know.
  ranks[1] = makeFacts(1, 1, 2, Link::kPcie);
  EXPECT_EQ(pairPath(ranks[0], ranks[1]), PairPath::kPcie);
}

TEST(DeviceProbe, StreamsThatCannotWaitForMemoryExcludeIt) {
  auto ranks = makeNode(3, Link::kNvlink);
  ranks[2].flagsSupported = false;
  const DeviceChoice choice = chooseInNode(ranks);
  EXPECT_EQ(choice.nodeMemory, std::vector<bool>{false});
  expectLine(
      choice,
      "node 0: GPU memory cannot be shared, because streams of rank 2 cannot "
      "wait for memory");
}

TEST(DeviceProbe, AFabricBetweenNodesIsSaid) {
  auto ranks = makeNode(2, Link::kNvlink);
  for (DeviceFacts& facts : ranks) {
    facts.inFabric = true;
    facts.fabric = uuidOf(100);
    facts.clique = 3;
  }
  const std::vector<int> nodeOf = {0, 1};
  const std::string line =
      "NVLink joins nodes 0 and 1 (fabric clique 3); between nodes, that is "
      "left to NCCL";
  expectLine(choosePath(ranks, nodeOf), line);
  ranks[1].clique = 4;
  EXPECT_EQ(textOf(choosePath(ranks, nodeOf)).find("joins"), std::string::npos);
}

TEST(DeviceProbe, NotesAreToldWithTheirRank) {
  auto ranks = makeNode(2, Link::kNvlink);
  ranks[1].notes.push_back("NVML is not used: no such file");
  expectLine(chooseInNode(ranks), "rank 1: NVML is not used: no such file");
}

TEST(DeviceFacts, ComeBackFromBytes) {
  DeviceFacts facts = makeFacts(3, 1, 4, Link::kNvlink);
  facts.inFabric = true;
  facts.fabric = uuidOf(7);
  facts.clique = 9;
  facts.ncclSharesGpus = true;
  facts.notes = {"one", "two"};
  EXPECT_EQ(decodeFacts(encodeFacts(facts)), facts);
  DeviceFacts none;
  none.whyNoDevice = "there is no NVIDIA driver";
  none.whyNoNccl = "no file";
  EXPECT_EQ(decodeFacts(encodeFacts(none)), none);
}

TEST(DeviceFacts, AreBounded) {
  DeviceFacts facts = makeFacts(0, 0, 300, Link::kPcie);
  facts.name = std::string(5000, 'x');
  facts.notes.assign(100, "note");
  const DeviceFacts back = decodeFacts(encodeFacts(facts));
  EXPECT_EQ(back.name, std::string(400, 'x'));
  EXPECT_EQ(back.peers.size(), 128U);
  EXPECT_EQ(back.notes.size(), 16U);
}

TEST(DeviceFacts, EveryShortenedOrLongerFormIsRefused) {
  DeviceFacts facts = makeFacts(0, 0, 2, Link::kPcie);
  facts.notes = {"note"};
  const std::string bytes = encodeFacts(facts);
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_THROW(decodeFacts(bytes.substr(0, size)), TransportError) << size;
  }
  EXPECT_THROW(decodeFacts(bytes + "x"), TransportError);
}

TEST(DeviceFacts, ForgedFieldsAreRefused) {
  const std::string bytes = encodeFacts(DeviceFacts{});
  std::string forged = bytes;
  forged[0] = 2;  // the version
  EXPECT_THROW(decodeFacts(forged), TransportError);
  forged = bytes;
  forged.back() = 1;  // the number of notes, 16 million
  EXPECT_THROW(decodeFacts(forged), TransportError);
  forged = bytes;
  forged[forged.size() - 5] = 2;  // a yes or no
  EXPECT_THROW(decodeFacts(forged), TransportError);
}

TEST(DeviceFacts, ThisMachineIsDescribedWithoutError) {
  const DeviceFacts facts = collectFacts({.rank = 5});
  EXPECT_EQ(facts.rank, 5);
  EXPECT_EQ(facts.hasDevice(), facts.whyNoDevice.empty()) << facts.whyNoDevice;
  const std::vector<std::string> bytes = {encodeFacts(facts)};
  const auto lines = explainDevices(bytes, std::vector<int>{0});
  EXPECT_EQ(
      lines.front().rfind(
          facts.hasDevice() ? "rank 5: " : "no CUDA device: ", 0),
      0U)
      << lines.front();
}

TEST(DeviceFacts, AGivenReasonIsTakenOver) {
  const DeviceFacts facts = collectFacts({.whyNoDevice = "torch is old"});
  EXPECT_FALSE(facts.hasDevice());
  EXPECT_EQ(facts.whyNoDevice, "torch is old");
}

TEST(DeviceFacts, AreExplainedOnlyWithANodeEach) {
  const std::vector<std::string> facts = {encodeFacts(DeviceFacts{})};
  EXPECT_THROW(explainDevices(facts, {}), InvalidArgument);
}

TEST(CudaDevice, IsThereOrTheReasonIs) {
  const CudaDeviceResult made = makeCudaDevice(1 << 20);
  EXPECT_EQ(made.device, nullptr);
  EXPECT_FALSE(made.reason.empty());
}

TEST(Nvml, UuidsAreReadAndWritten) {
  DeviceUuid uuid;
  for (size_t i = 0; i < uuid.size(); ++i) {
    uuid[i] = static_cast<uint8_t>(i * 17);
  }
  const std::string text = "GPU-00112233-4455-6677-8899-aabbccddeeff";
  EXPECT_EQ(uuidText(uuid), text);
  EXPECT_EQ(parseUuid(text), uuid);
  EXPECT_FALSE(parseUuid("MIG-00112233-4455-6677-8899-aabbccddeeff"));
  EXPECT_FALSE(parseUuid(text.substr(0, text.size() - 1)));
  EXPECT_FALSE(parseUuid(text + "0"));
  EXPECT_FALSE(parseUuid("GPU-0011223x-4455-6677-8899-aabbccddeeff"));
}

}  // namespace
}  // namespace automoe
