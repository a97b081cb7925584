// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/discovery.hpp"

#include <sys/random.h>
#include <unistd.h>

#include <utility>
#include <vector>

#include "process_group/common/bytes.hpp"
#include "process_group/common/error.hpp"
#include "process_group/common/log.hpp"

namespace automoe {
namespace {

using Clock = std::chrono::steady_clock;

/// First round: what a rank says before it has met anybody.
struct Introduction {
  uint32_t version = Record::kVersion;
  uint64_t process = 0;
  uint64_t nonce = 0;
  int64_t pid = 0;
  std::string host;
  std::string memoryAddress;
  std::string node;  // its pin, or empty

  std::string encode() const {
    ByteWriter writer;
    writer.put(version);
    writer.put(process);
    writer.put(nonce);
    writer.put(pid);
    writer.putString(host);
    writer.putString(memoryAddress);
    writer.putString(node);
    return writer.take();
  }
  static Introduction decode(const std::string& bytes) {
    ByteReader reader(bytes);
    Introduction it;
    it.version = reader.get<uint32_t>();
    it.process = reader.get<uint64_t>();
    it.nonce = reader.get<uint64_t>();
    it.pid = reader.get<int64_t>();
    it.host = reader.getString();
    it.memoryAddress = reader.getString();
    it.node = reader.getString();
    return it;
  }
};

/// What a rank says in a later round: its finding, or why it has none. The
/// error of one rank is then every rank's, and nobody waits for its answer.
template <typename Find>
std::string finding(const Find& find) {
  ByteWriter writer;
  try {
    const std::string found = find();
    writer.putString("");
    writer.putString(found);
  } catch (const std::exception& error) {
    writer.putString(error.what());
  }
  return writer.take();
}

std::string hostName() {
  char name[256] = "";
  ::gethostname(name, sizeof(name) - 1);
  return name;
}

// FNV-1a; the nonce makes it differ between incarnations of one name.
uint64_t groupId(const std::string& name, uint64_t nonce) {
  uint64_t hash = 14695981039346656037ULL;
  const auto mix = [&hash](const char* bytes, size_t size) {
    for (size_t i = 0; i < size; ++i) {
      hash = (hash ^ static_cast<uint8_t>(bytes[i])) * 1099511628211ULL;
    }
  };
  mix(name.data(), name.size());
  mix(reinterpret_cast<const char*>(&nonce), sizeof(nonce));
  return hash;
}

class Round {
 public:
  // A store may outlive a group and be used for its successor of the same
  // name; each rank counts its incarnations, so the counts agree.
  Round(KeyValueStore& store, const std::string& name, int rank, int size)
      : store_(store), prefix_("automoe/" + name), rank_(rank), size_(size) {
    incarnation_ = store.add(concat(prefix_, "/incarnation/", rank), 1);
  }

  std::vector<std::string> exchange(
      const char* round, const std::string& value) {
    std::vector<std::string> keys;
    for (int rank = 0; rank < size_; ++rank) {
      keys.push_back(concat(prefix_, "/", incarnation_, "/", round, "/", rank));
    }
    store_.set(keys[static_cast<size_t>(rank_)], value);
    return store_.get(keys);
  }

 private:
  KeyValueStore& store_;
  const std::string prefix_;
  int rank_;
  int size_;
  int64_t incarnation_;
};

void checkVersions(const std::vector<Introduction>& all) {
  for (size_t rank = 0; rank < all.size(); ++rank) {
    if (all[rank].version != all[0].version) {
      throw InvalidArgument(concat(
          "rank ",
          rank,
          " on ",
          all[rank].host,
          " speaks version ",
          all[rank].version,
          " of the automoe protocol, rank 0 on ",
          all[0].host,
          " version ",
          all[0].version,
          "; install the same torch_automoe on all nodes"));
    }
  }
}

// The lowest rank that this rank shares memory with, having met all lower
// ranks of its node.
int64_t findLabel(
    Engine& engine,
    const std::vector<Introduction>& all,
    int rank,
    Clock::time_point deadline) {
  const Introduction& self = all[static_cast<size_t>(rank)];
  int64_t label = rank;
  for (int other = rank - 1; other >= 0; --other) {
    const Introduction& it = all[static_cast<size_t>(other)];
    if (it.node != self.node) {
      continue;  // pinned to another node
    }
    const bool met = engine.meet(it.process, it.memoryAddress, deadline);
    if (met) {
      label = other;
    } else if (!self.node.empty()) {
      throw InvalidArgument(concat(
          "AUTOMOE_NODE is '",
          self.node,
          "' on rank ",
          rank,
          " (",
          self.host,
          ") and on rank ",
          other,
          " (",
          it.host,
          "), but they cannot map each other's memory; pin only ranks of one "
          "host and one network namespace to a node, or leave it unset"));
    }
  }
  return label;
}

std::vector<std::string> findings(
    const std::vector<std::string>& said, const std::string& name) {
  std::vector<std::string> found;
  for (size_t rank = 0; rank < said.size(); ++rank) {
    ByteReader reader(said[rank]);
    const std::string error = reader.getString();
    if (!error.empty()) {
      throw InvalidArgument(
          concat("rank ", rank, " cannot join group ", name, ": ", error));
    }
    found.push_back(reader.getString());
  }
  return found;
}

Introduction introduce(const Engine& engine, const GroupSettings& settings) {
  Introduction self;
  self.process = engine.process();
  AUTOMOE_CHECK(
      ::getrandom(&self.nonce, sizeof(self.nonce), 0) == sizeof(self.nonce),
      "getrandom failed");
  self.pid = ::getpid();
  self.host = hostName();
  self.memoryAddress = engine.memoryAddress();
  self.node = settings.node.empty() ? engine.config().node : settings.node;
  return self;
}

}  // namespace

std::shared_ptr<Group> joinGroup(
    Engine& engine,
    KeyValueStore& store,
    int rank,
    int size,
    const std::string& name,
    std::chrono::milliseconds timeout,
    std::vector<int> globalRanks,
    const GroupSettings& settings) {
  engine.checkUsable();
  const Introduction self = introduce(engine, settings);
  const bool mergeRows = settings.mergeRows.value_or(engine.config().mergeRows);
  if (size == 1) {
    return engine.addGroup(Membership{
        .id = groupId(name, self.nonce),
        .name = name,
        .topology = Topology::fromNodeLabels({0}, 0),
        .peers = {nullptr},
        .globalRanks = std::move(globalRanks),
        .mergeRows = mergeRows});
  }
  const auto deadline = Clock::now() + timeout;
  Round round(store, name, rank, size);
  std::vector<Introduction> all;
  for (const auto& it : round.exchange("introduction", self.encode())) {
    all.push_back(Introduction::decode(it));
  }
  const auto agree = [&](const char* what, const auto& find) {
    return findings(round.exchange(what, finding(find)), name);
  };
  std::vector<int64_t> labels;
  for (const auto& label : agree("placement", [&] {
         checkVersions(all);
         return std::to_string(findLabel(engine, all, rank, deadline));
       })) {
    labels.push_back(std::stoll(label));
  }
  Topology topology = Topology::fromNodeLabels(labels, rank);
  std::vector<std::string> addresses(static_cast<size_t>(size));
  if (topology.numNodes() > 1) {
    addresses = agree("network", [&] { return engine.networkAddress(); });
  }
  std::vector<Peer*> peers(static_cast<size_t>(size), nullptr);
  for (int other = 0; other < size; ++other) {
    const auto index = static_cast<size_t>(other);
    const Introduction& it = all[index];
    if (other == rank) {
      continue;
    }
    if (topology.nodeOf(other) == topology.node() &&
        !engine.awaitMate(it.process, deadline)) {
      throw TransportError(
          concat("rank ", other, " (", it.host, ") did not meet rank ", rank));
    }
    peers[index] =
        engine.addPeer(it.process, it.host, it.pid, addresses[index]);
  }
  log(LogLevel::kInfo, concat("group ", name, ": ", topology.describe()));
  return engine.addGroup(Membership{
      .id = groupId(name, all[0].nonce),
      .name = name,
      .topology = std::move(topology),
      .peers = std::move(peers),
      .globalRanks = std::move(globalRanks),
      .mergeRows = mergeRows});
}

}  // namespace automoe
