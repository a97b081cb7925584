// SPDX-License-Identifier: Apache-2.0
// Records that no good rank sends: the group of their receiver fails with an
// error, and its process lives on.
#include "forged_records.hpp"

namespace automoe::testing {
namespace {

TEST_F(ForgedRecordTest, RankOutsideTheGroup) {
  Record record = make(RecordKind::kPosted, 2);
  record.source = 99;
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, NegativeRank) {
  Record record = make(RecordKind::kPosted, 2);
  record.source = -1;
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, OwnRankAsItsSource) {
  Record record = make(RecordKind::kPosted, 2);
  record.source = kVictim;
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, OwnerOutsideTheGroup) {
  Record record = make(RecordKind::kPosted, 2);
  record.owner = 3;
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, UnknownKind) {
  Record record = make(RecordKind::kPosted, 2);
  record.kind = static_cast<RecordKind>(77);
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, UnknownCarrier) {
  victimPosts();
  Record record = make(RecordKind::kPosted, 2);
  record.carrier = static_cast<Carrier>(77);
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, CarrierOfNothingForABlockOfSomething) {
  victimPosts();
  Record record = make(RecordKind::kPosted, 2);
  record.carrier = Carrier::kNone;
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, SameOperationPostedTwice) {
  Record record = make(RecordKind::kPosted, 2);
  record.carrier = Carrier::kLater;
  sendByMailbox(record);
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, InlineBlockWithoutItsBytes) {
  victimPosts();
  Record record = make(RecordKind::kPosted, 2);
  record.carrier = Carrier::kInline;
  sendByMailbox(record, "short");
  expectGroupFails();
}

TEST_F(ForgedRecordTest, InlineBlockWithoutItsBytesBeforeTheCall) {
  Record record = make(RecordKind::kPosted, 2);
  record.carrier = Carrier::kInline;
  sendByMailbox(record, "short");
  // A mailbox keeps order: when this has ended, the record is there.
  ranks_.run([&](int rank) {
    Group& group = *other_[static_cast<size_t>(rank)];
    finish(ranks_.engine(rank), post(group, equalSizes(3, 1)));
  });
  victimPosts();
  expectGroupFails();
}

TEST_F(ForgedRecordTest, ExtentOfTheVictimItself) {
  victimPosts();
  Record record = make(RecordKind::kPosted, 2);
  record.carrier = Carrier::kExtent;
  record.owner = kVictim;
  record.place = 8192;
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, ExtentOfARankOfAnotherNode) {
  victimPosts();
  Record record = make(RecordKind::kPosted, 2);
  record.carrier = Carrier::kExtent;
  record.owner = 0;
  record.place = 8192;
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, ExtentOutsideTheMemory) {
  victimPosts();
  Record record = make(RecordKind::kPosted, 2);
  record.carrier = Carrier::kExtent;
  record.owner = 2;
  record.place = uint64_t{1} << 40;
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, ExtentWhoseOffsetWrapsBeforeTheCall) {
  Record record = make(RecordKind::kPosted, 2);
  record.carrier = Carrier::kExtent;
  record.owner = 2;
  record.place = 8192;
  record.offset = ~uint64_t{0} - 8192 - 50;
  sendByMailbox(record);
  ranks_.run([&](int rank) {
    Group& group = *other_[static_cast<size_t>(rank)];
    finish(ranks_.engine(rank), post(group, equalSizes(3, 1)));
  });
  victimPosts();
  expectGroupFails();
}

TEST_F(ForgedRecordTest, TensorOfARankOfAnotherNode) {
  victimPosts();
  Record record = make(RecordKind::kPosted, 2);
  record.source = 0;
  record.carrier = Carrier::kCrossMemory;
  record.place = 4096;
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, TensorThatIsNotThere) {
  victimPosts();
  Record record = make(RecordKind::kPosted, 2);
  record.carrier = Carrier::kCrossMemory;
  record.place = 64;
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, ChunkBeforeTheCall) {
  Record record = make(RecordKind::kPayload, 0);
  record.bytes = kBlock;
  sendByNetwork(record, std::string(kBlock, 'x'));
  expectGroupFails();
}

TEST_F(ForgedRecordTest, ChunkBehindItsBlock) {
  victimPosts();
  Record record = make(RecordKind::kPayload, 0);
  record.offset = kBlock - 10;
  record.bytes = 11;
  sendByNetwork(record, std::string(11, 'x'));
  expectGroupFails();
}

TEST_F(ForgedRecordTest, ChunkWhoseOffsetWraps) {
  victimPosts();
  Record record = make(RecordKind::kPayload, 0);
  record.offset = ~uint64_t{0};
  record.bytes = 1;
  sendByNetwork(record, "x");
  expectGroupFails();
}

TEST_F(ForgedRecordTest, ChunkWithoutItsBytes) {
  victimPosts();
  Record record = make(RecordKind::kPayload, 0);
  record.bytes = kBlock;
  sendByNetwork(record, "short");
  expectGroupFails();
}

TEST_F(ForgedRecordTest, StagedChunkOfARankOfAnotherNode) {
  victimPosts();
  Record record = make(RecordKind::kStaged, 0);
  record.place = 8192;
  record.bytes = 10;
  sendByNetwork(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, StagedChunkOutsideTheMemory) {
  victimPosts();
  Record record = make(RecordKind::kStaged, 2);
  record.place = uint64_t{1} << 40;
  record.bytes = 10;
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedRecordTest, PacketOfNonsense) {
  Record record = make(RecordKind::kPosted, 0);
  sendByNetwork(record, "nonsense");
  expectGroupFails();
}

TEST_F(ForgedRecordTest, PacketForMoreRanksThanThereAre) {
  Packet packet;
  packet.sizes.resize(3, {0, 0});
  sendByNetwork(make(RecordKind::kPosted, 0), encodePacket(packet));
  expectGroupFails();
}

// Not of the group at all: dropped, and nobody is the worse for it.

TEST_F(ForgedRecordTest, StrangersAreIgnored) {
  Record record = make(RecordKind::kPosted, 0);
  record.magic += 1;
  sendByNetwork(record);
  record = make(RecordKind::kPosted, 0);
  record.group += 1;
  sendByNetwork(record, std::string(1000, 'x'));
  record = make(RecordKind::kPosted, 2);
  record.version += 1;
  sendByMailbox(record);
  ranks_.run([&](int rank) {
    finish(ranks_.engine(rank), post(ranks_.group(rank), equalSizes(3, 5000)));
  });
}

}  // namespace
}  // namespace automoe::testing
