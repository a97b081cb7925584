// SPDX-License-Identifier: Apache-2.0
// Messages between two ranks of a group: what every collective but those with
// plans is made of, and send and receive too.
#pragma once

#include <compare>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "process_group/exchange/operation.hpp"
#include "process_group/exchange/record.hpp"
#include "process_group/exchange/transfers.hpp"

namespace automoe {

class Group;

/// Which message it is, among those between this rank and `peer` in one
/// direction.
struct MessageKey {
  bool pair = false;      // of send and receive
  uint64_t sequence = 0;  // of the collective; or the pair's own number
  int peer = 0;
  uint32_t slot = 0;

  auto operator<=>(const MessageKey&) const = default;
};

/// What both sides of a message must agree on; the fields of the record.
struct MessageDescription {
  OperationKind operation = OperationKind::kPair;
  uint8_t dtype = 0;
  uint8_t reduction = 0;  // `scalarBytes` of the record
  int32_t root = 0;       // `owner`
  uint64_t total = 0;     // bytes of the collective, `receiveBytes`
  uint64_t tag = 0;       // of a pair, `plan`
  /// Names in error texts.
  const char* (*dtypeName)(uint8_t) = nullptr;
  const char* (*reductionName)(uint8_t) = nullptr;
};

struct MessageSend {
  std::shared_ptr<Operation> operation;
  MessageKey key;  // the peer is the destination
  MessageDescription description;
  const std::byte* data = nullptr;
  uint64_t bytes = 0;
  std::function<void()> done;  // the memory is the caller's again
};

struct MessageReceive {
  std::shared_ptr<Operation> operation;
  MessageKey key;  // the peer is the source
  MessageDescription description;
  std::byte* to = nullptr;
  uint64_t bytes = 0;
  std::function<void()> done;  // every byte is there
};

/// A message that is small rides with its record: through the mailbox of a
/// node-mate, or eagerly over the network, if its receiver has room for it (a
/// budget that it gives back by kCredit). Of a larger one the record only says
/// that it is there. A node-mate reads it from the sender's memory, with one
/// copy, or asks for it to be staged through node memory where the kernel
/// forbids that; a rank of another node says that it is ready, at its own call
/// when the size tells that it will have to, and the bytes go straight to
/// their place.
///
/// Guarded by the engine's lock.
class Messages {
 public:
  explicit Messages(Group& group);

  void send(MessageSend send);
  /// Of a collective: both sides know the key before.
  void receive(MessageReceive receive);
  /// The same for a message whose record is here. Fails the group, and does
  /// nothing else, when the two do not agree.
  void take(
      const Record& record,
      std::span<const std::byte> payload,
      MessageReceive receive);

  /// Any kind of record above; a kMessage of a pair goes to PairTable instead.
  void handle(const Record& record, std::span<const std::byte> payload);
  /// A record of a message, with what its collective is.
  Record makeRecord(
      RecordKind kind,
      const MessageKey& key,
      const MessageDescription& description) const;
  /// Throws TransportError for a kMessage that makes no sense.
  void checkForm(
      const Record& record, std::span<const std::byte> payload) const;
  /// What a record of another rank says about its collective, and this rank's
  /// call: empty when they agree.
  std::string disagreement(
      const Record& theirs, const MessageDescription& own) const;
  /// The same for all records of a collective that came before its call.
  std::string disagreementOfKept(
      uint64_t sequence, const MessageDescription& own) const;
  /// The group has failed.
  void abandon();

 private:
  struct Incoming {
    MessageReceive receive;
    bool announced = false;
    bool readySent = false;
    bool unconfirmed = false;  // read, but a group of its rank has failed
    std::string readError;     // why that read was refused
    uint64_t failures = 0;
    uint64_t got = 0;
  };
  struct Kept {
    Record record;
    std::string payload;
  };
  struct Credit {
    size_t unmatched = 0;  // bytes that rode to it
    size_t consumed = 0;   // bytes that rode from it, not yet told
  };

  // What riding costs the receiver beside the bytes.
  static constexpr size_t kOverhead = sizeof(Record);

  static MessageKey keyOf(const Record& record);
  bool tryRide(int peer, uint64_t bytes);
  void consumed(int peer, uint64_t bytes);
  void sendToMate(MessageSend send, Record record);
  void sendToNode(MessageSend send, Record record);
  void stream(MessageSend send);
  void tellReady(Incoming& incoming);
  bool agrees(const Record& record, const MessageReceive& receive);
  void arrived(const Record& record, std::span<const std::byte> payload);
  void chunkArrived(const Record& record, std::span<const std::byte> payload);
  void ready(const Record& record);
  void readFromMate(const Record& record, const MessageKey& key);
  void readEnded(const MessageKey& key, bool certain, const std::string& error);
  void readDone(const Record& record);
  void confirmed(const Record& record);
  void finishIfWhole(const MessageKey& key);
  void finish(const MessageKey& key);

  Group& group_;
  std::map<MessageKey, MessageSend> outgoing_;  // that wait for the receiver
  std::set<MessageKey> earlyReady_;             // it waits for us
  std::map<MessageKey, Incoming> incoming_;
  std::map<MessageKey, Kept> kept_;  // before our call
  std::vector<Credit> credits_;      // by rank
};

}  // namespace automoe
