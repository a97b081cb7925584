// SPDX-License-Identifier: Apache-2.0
// The double of DeviceNetwork, by NCCL's rules: the exchanges of a network run
// in order, each blocks its stream until all of its transfers are done, and a
// transfer moves only while both of its sides run.
#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <span>
#include <utility>

#include "cuda/double_device.hpp"
#include "cuda/double_state.hpp"

namespace automoe::testing {

// The networks of all ranks of one group.
class DoubleFabric {
 public:
  // One side of a transfer: the exchange it is part of.
  struct Side {
    std::shared_ptr<DoubleStream> stream = nullptr;  // null: not there yet
    uint64_t position = 0;                           // of the item on it
    uint64_t turn = 0;
    std::byte* memory = nullptr;
    size_t bytes = 0;
  };
  struct Transfer {
    int from = 0;
    int to = 0;
    uint64_t number = 0;  // of its pair
    Side sender = {};
    Side receiver = {};
    bool moved = false;
    bool broken = false;
  };
  using Transfers = std::vector<std::shared_ptr<Transfer>>;

  struct Member {
    int rank = 0;  // of the world
    bool made = false;
    bool aborted = false;
    bool gone = false;
    uint64_t turns = 0;
    uint64_t turnsDone = 0;
    std::string failure = {};
  };

  DoubleFabric(DoubleWorld::State& state, const std::vector<int>& ranks)
      : state_(state) {
    for (int rank : ranks) {
      members_.push_back({rank});
    }
  }

  int size() const { return static_cast<int>(members_.size()); }
  Member& member(int index) { return members_[static_cast<size_t>(index)]; }

  std::shared_ptr<Transfer> post(int from, int to, bool sends, Side side);
  // The transfers of one exchange of a member.
  Transfers postAll(
      int index,
      const std::shared_ptr<DoubleStream>& stream,
      std::span<const DeviceNetwork::Send> sends,
      std::span<const DeviceNetwork::Receive> receives);
  // Of one exchange of a member.
  bool isOver(const Transfers& transfers, int index) const;
  bool isReady(const Transfers& transfers, int index) const;
  bool advance(const Transfers& transfers, int index);
  void breakUp(Transfer& transfer, const std::string& text);
  std::string describe(const Transfers& transfers) const;

 private:
  struct Channel {
    uint64_t numbers = 0;
    // Those whose other side is not there yet: all sends, or all receives.
    std::deque<std::shared_ptr<Transfer>> waiting = {};
  };

  bool canMove(const Transfer& transfer) const;
  void move(Transfer& transfer);
  bool active(const Side& side, int index) const;
  bool usable(const Side& side, int index);

  DoubleWorld::State& state_;
  std::vector<Member> members_;
  std::map<std::pair<int, int>, Channel> channels_;
};

std::shared_ptr<DoubleFabric::Transfer> DoubleFabric::post(
    int from, int to, bool sends, Side side) {
  Channel& channel = channels_[{from, to}];
  const auto missing = [&](const Transfer& transfer) -> const Side& {
    return sends ? transfer.sender : transfer.receiver;
  };
  std::shared_ptr<Transfer> transfer;
  if (!channel.waiting.empty() &&
      missing(*channel.waiting.front()).stream == nullptr) {
    transfer = channel.waiting.front();
    channel.waiting.pop_front();
  } else {
    transfer = std::make_shared<Transfer>();
    transfer->from = from;
    transfer->to = to;
    transfer->number = channel.numbers++;
    channel.waiting.push_back(transfer);
  }
  (sends ? transfer->sender : transfer->receiver) = std::move(side);
  const Side& other = sends ? transfer->receiver : transfer->sender;
  if (other.stream != nullptr &&
      transfer->sender.bytes != transfer->receiver.bytes) {
    breakUp(
        *transfer,
        concat(
            transfer->sender.bytes,
            " bytes are sent, ",
            transfer->receiver.bytes,
            " received"));
  }
  return transfer;
}

// As with NCCL, transfers of no bytes do not take place.
DoubleFabric::Transfers DoubleFabric::postAll(
    int index,
    const std::shared_ptr<DoubleStream>& stream,
    std::span<const DeviceNetwork::Send> sends,
    std::span<const DeviceNetwork::Receive> receives) {
  Transfers transfers;
  const uint64_t turn = member(index).turns++;
  const auto side = [&](const std::byte* memory, size_t bytes) {
    return Side{
        stream, stream->enqueued, turn, const_cast<std::byte*>(memory), bytes};
  };
  for (const auto& [peer, data, bytes] : sends) {
    if (bytes > 0) {
      transfers.push_back(post(index, peer, true, side(data, bytes)));
    }
  }
  for (const auto& [peer, data, bytes] : receives) {
    if (bytes > 0) {
      transfers.push_back(post(peer, index, false, side(data, bytes)));
    }
  }
  return transfers;
}

bool DoubleFabric::active(const Side& side, int index) const {
  const Member& owner = members_[static_cast<size_t>(index)];
  return side.stream != nullptr && !owner.aborted &&
         state_.streams.open(*side.stream) && owner.turnsDone == side.turn &&
         side.stream->done == side.position;
}

bool DoubleFabric::canMove(const Transfer& transfer) const {
  return !transfer.moved && !transfer.broken &&
         active(transfer.sender, transfer.from) &&
         active(transfer.receiver, transfer.to);
}

bool DoubleFabric::usable(const Side& side, int index) {
  const int rank = member(index).rank;
  try {
    state_.memory.use(rank, side.memory, side.bytes);
    return true;
  } catch (const DeviceError& error) {
    state_.fail(rank, concat("exchange: ", error.what()));
    return false;
  }
}

void DoubleFabric::move(Transfer& transfer) {
  if (!usable(transfer.sender, transfer.from) ||
      !usable(transfer.receiver, transfer.to)) {
    breakUp(transfer, "memory is gone");
    return;
  }
  const size_t bytes = transfer.sender.bytes;
  std::memmove(transfer.receiver.memory, transfer.sender.memory, bytes);
  state_.at(member(transfer.from).rank).statistics.sentBytes += bytes;
  transfer.moved = true;
}

// As with NCCL, its streams stay blocked until abort().
void DoubleFabric::breakUp(Transfer& transfer, const std::string& text) {
  transfer.broken = true;
  for (int index : {transfer.from, transfer.to}) {
    if (member(index).failure.empty()) {
      member(index).failure = concat(
          "transfer ",
          transfer.number,
          " from rank ",
          transfer.from,
          " to rank ",
          transfer.to,
          ": ",
          text);
    }
  }
}

bool DoubleFabric::isOver(const Transfers& transfers, int index) const {
  return members_[static_cast<size_t>(index)].aborted ||
         std::all_of(transfers.begin(), transfers.end(), [](const auto& each) {
           return each->moved;
         });
}

bool DoubleFabric::isReady(const Transfers& transfers, int index) const {
  return isOver(transfers, index) ||
         std::any_of(transfers.begin(), transfers.end(), [&](const auto& each) {
           return canMove(*each);
         });
}

// Moves one of them; true when the exchange is over.
bool DoubleFabric::advance(const Transfers& transfers, int index) {
  Transfers movable;
  for (const auto& transfer : transfers) {
    if (canMove(*transfer)) {
      movable.push_back(transfer);
    }
  }
  if (!movable.empty()) {
    move(*movable[state_.streams.draw(movable.size())]);
  }
  const bool over = isOver(transfers, index);
  member(index).turnsDone += over ? 1 : 0;
  return over;
}

std::string DoubleFabric::describe(const Transfers& transfers) const {
  const auto found =
      std::find_if(transfers.begin(), transfers.end(), [](const auto& each) {
        return !each->moved;
      });
  if (found == transfers.end()) {
    return "exchange";
  }
  const Transfer& transfer = **found;
  std::string lacks = "the receive does not run";
  if (transfer.broken) {
    lacks = "broken";
  } else if (transfer.sender.stream == nullptr) {
    lacks = "no send";
  } else if (transfer.receiver.stream == nullptr) {
    lacks = "no receive";
  } else if (!active(transfer.sender, transfer.from)) {
    lacks = "the send does not run";
  }
  return concat(
      "exchange, transfer ",
      transfer.number,
      " from rank ",
      transfer.from,
      " to rank ",
      transfer.to,
      " of the group (",
      lacks,
      ")");
}

namespace {

// An exchange of a member, whose network it may outlive.
struct Exchange {
  std::shared_ptr<DoubleFabric> fabric;
  int index;
  std::vector<DeviceNetwork::Send> sends;
  std::vector<DeviceNetwork::Receive> receives;
  std::string fault;  // why it does not come to its end, or nothing

  bool isEmpty() const {
    const auto none = [](const auto& each) { return each.bytes == 0; };
    return std::ranges::all_of(sends, none) &&
           std::ranges::all_of(receives, none);
  }
  StreamItem makeItem(const std::shared_ptr<DoubleStream>& stream) const;
  // Its transfers are those of the launch that it is part of.
  StreamItem makeNode() const;
};

StreamItem Exchange::makeItem(
    const std::shared_ptr<DoubleStream>& stream) const {
  const auto transfers = std::make_shared<const DoubleFabric::Transfers>(
      fabric->postAll(index, stream, sends, receives));
  for (const auto& transfer : *transfers) {
    if (!fault.empty()) {
      fabric->breakUp(*transfer, fault);
    }
  }
  return {
      [fabric = fabric, transfers] { return fabric->describe(*transfers); },
      [fabric = fabric, transfers, index = index] {
        return fabric->isReady(*transfers, index);
      },
      [fabric = fabric, transfers, index = index] {
        return fabric->advance(*transfers, index);
      }};
}

StreamItem Exchange::makeNode() const {
  StreamItem item{[] { return std::string("exchange"); }};
  item.again = [it = *this](const std::shared_ptr<DoubleStream>& stream) {
    if (!it.fabric->member(it.index).gone) {
      return it.makeItem(stream);
    }
    StreamItem broken{[] { return std::string("exchange"); }};
    broken.step = []() -> bool {
      throw DeviceError("the network of this graph was destroyed");
    };
    return broken;
  };
  return item;
}

class DoubleNetwork final : public DeviceNetwork {
 public:
  DoubleNetwork(
      DoubleWorld::State& state,
      std::shared_ptr<DoubleFabric> fabric,
      int index)
      : state_(state), fabric_(std::move(fabric)), index_(index) {}
  ~DoubleNetwork() override;

  void exchange(
      Device::Stream stream,
      std::span<const Send> sends,
      std::span<const Receive> receives) override;
  void abort() noexcept override;
  std::string failure() override;

 private:
  DoubleFabric::Member& self() { return fabric_->member(index_); }
  void check(int peer, const std::byte* memory, size_t bytes);
  std::string faultOf(int rank);

  DoubleWorld::State& state_;
  std::shared_ptr<DoubleFabric> fabric_;
  int index_;
};

DoubleNetwork::~DoubleNetwork() {
  state_.quietCall(self().rank, "~DeviceNetwork", [&](auto&) {
    self().gone = true;
    const uint64_t left = self().turns - self().turnsDone;
    if (left > 0 && !self().aborted) {
      self().aborted = true;
      state_.streams.touch();
      throw DeviceError(
          concat(left, " exchanges are under way: wait or abort() before"));
    }
  });
}

void DoubleNetwork::check(int peer, const std::byte* memory, size_t bytes) {
  if (peer < 0 || peer >= fabric_->size()) {
    throw DeviceError(concat(
        "peer ", peer, " is not in the group of ", fabric_->size(), " ranks"));
  }
  using Place = DoubleMemory::Place;
  if (bytes > 0 &&
      state_.memory.use(self().rank, memory, bytes) == Place::kPageable) {
    throw DeviceError(
        state_.memory.describe(memory) + " is not memory of the device");
  }
}

std::string DoubleNetwork::faultOf(int rank) {
  try {
    state_.at(rank).failIfAsked("transfer");
    return {};
  } catch (const DeviceError& error) {
    return error.what();
  }
}

void DoubleNetwork::exchange(
    Device::Stream stream,
    std::span<const Send> sends,
    std::span<const Receive> receives) {
  const auto make = [&](DoubleStream& found) -> std::optional<StreamItem> {
    if (self().aborted) {
      throw DeviceError("the network was aborted");
    }
    for (const Send& send : sends) {
      check(send.peer, send.data, send.bytes);
    }
    for (const Receive& receive : receives) {
      check(receive.peer, receive.data, receive.bytes);
    }
    const Exchange it{
        fabric_,
        index_,
        {sends.begin(), sends.end()},
        {receives.begin(), receives.end()},
        faultOf(found.rank)};
    if (it.isEmpty()) {
      return std::nullopt;
    }
    return found.capture != nullptr
               ? it.makeNode()
               : it.makeItem(state_.streams.find(found.rank, stream));
  };
  state_.enqueue(self().rank, "exchange", stream, make);
}

void DoubleNetwork::abort() noexcept {
  state_.quietCall(self().rank, "abort", [&](auto&) {
    self().aborted = true;
    state_.streams.touch();
  });
}

std::string DoubleNetwork::failure() {
  const DoubleStreams::Lock lock(state_.streams.mutex());
  return self().failure;
}

}  // namespace

std::unique_ptr<DeviceNetwork> DoubleWorld::makeNetwork(
    int rank, const std::vector<int>& ranks, const std::string& name) {
  const State::Lock lock(state_->streams.mutex());
  const auto found = std::find(ranks.begin(), ranks.end(), rank);
  AUTOMOE_CHECK(
      found != ranks.end(), "rank ", rank, " is not one of the network");
  const auto index = static_cast<int>(found - ranks.begin());
  auto& fabrics = state_->fabrics[{ranks, name}];
  auto fabric =
      std::find_if(fabrics.begin(), fabrics.end(), [&](const auto& candidate) {
        return !candidate->member(index).made;
      });
  if (fabric == fabrics.end()) {
    fabrics.push_back(std::make_shared<DoubleFabric>(*state_, ranks));
    fabric = std::prev(fabrics.end());
  }
  (*fabric)->member(index).made = true;
  return std::make_unique<DoubleNetwork>(*state_, *fabric, index);
}

}  // namespace automoe::testing
