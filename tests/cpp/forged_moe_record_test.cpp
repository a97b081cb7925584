// SPDX-License-Identifier: Apache-2.0
// The same for records of plans, dispatches and combines.
#include "forged_records.hpp"
#include "moe_calls.hpp"

namespace automoe::testing {
namespace {

class ForgedMoeRecordTest : public ForgedRecordTest {
 protected:
  static constexpr uint64_t kSequence = 1;  // 0 is the plan's
  static constexpr size_t kColumns = 40000;

  ForgedMoeRecordTest() {
    ranks_.run([&](int rank) {
      plans_[static_cast<size_t>(rank)] =
          makePlan(ranks_.engine(rank), ranks_.group(rank), routing_);
    });
  }
  // Rows that do not ride with the record of a call.
  void victimDispatches() {
    makeCall();
    posted_.operation = ranks_.group(kVictim).dispatch(
        call_->dispatchArguments(), std::chrono::seconds(20), {});
  }
  void victimCombines() {
    makeCall();
    posted_.operation = ranks_.group(kVictim).combine(
        call_->combineArguments(true), std::chrono::seconds(20), {});
  }
  Record forge(RecordKind kind, OperationKind operation, int source) {
    Record record = make(kind, source);
    record.sequence = kSequence;
    record.operation = operation;
    record.sendBytes = 0;
    return record;
  }

  void makeCall() {
    call_ =
        std::make_unique<MoeCall>(routing_, plans_[kVictim], kVictim, kColumns);
  }

  Routing routing_{
      .numExperts = 3, .topK = 1, .ids = {{0, 1, 2}, {0, 1, 2}, {0, 1, 2}}};
  std::vector<PlanResult> plans_ = std::vector<PlanResult>(3);
  std::unique_ptr<MoeCall> call_;
};

TEST_F(ForgedMoeRecordTest, UnknownOperation) {
  sendByMailbox(forge(RecordKind::kPosted, static_cast<OperationKind>(77), 2));
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, AnotherOperationThanTheVictims) {
  victimDispatches();
  sendByMailbox(forge(RecordKind::kPosted, OperationKind::kCombine, 2));
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, ChunkOfADispatchBeforeTheCall) {
  Record record = forge(RecordKind::kCast, OperationKind::kDispatch, 0);
  record.bytes = 4;
  record.rows = 1;
  sendByNetwork(record, "1234");
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, ChunkOfADispatchThatIsTooShort) {
  victimDispatches();
  Record record = forge(RecordKind::kCast, OperationKind::kDispatch, 0);
  record.bytes = 4;
  record.rows = 1;
  sendByNetwork(record, "1234");
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, ChunkOfADispatchBehindItsRows) {
  victimDispatches();
  Record record = forge(RecordKind::kCast, OperationKind::kDispatch, 0);
  record.bytes = 4;
  record.offset = ~uint64_t{0};
  record.rows = 2;
  sendByNetwork(record, "1234");
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, ChunkOfADispatchInAnExtentByNetwork) {
  victimDispatches();
  Record record = forge(RecordKind::kCast, OperationKind::kDispatch, 0);
  record.carrier = Carrier::kExtent;
  record.rows = 1;
  sendByNetwork(record);
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, DispatchWithMoreBytesThanItHasRows) {
  victimDispatches();
  Record record = forge(RecordKind::kPosted, OperationKind::kDispatch, 0);
  record.plan = Route(plans_[kVictim].route).fingerprint();
  record.elementBytes = sizeof(float);
  record.receiveBytes = kColumns * sizeof(float);
  record.carrier = Carrier::kInline;
  record.rows = 1;
  record.sendBytes = 400;
  record.bytes = 400;
  sendByNetwork(record, std::string(400, 'x'));
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, CombineWithAPayload) {
  sendByMailbox(forge(RecordKind::kPosted, OperationKind::kCombine, 2), "x");
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, CombineThatIsPostedTwice) {
  const Record record = forge(RecordKind::kPosted, OperationKind::kCombine, 2);
  sendByMailbox(record);
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, RowsOfACombineFromAnotherNode) {
  victimCombines();
  Record record = forge(RecordKind::kStaged, OperationKind::kCombine, 0);
  record.rows = 1;
  record.place = 8192;
  record.bytes = 10;
  sendByNetwork(record);
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, RowsOfACombineOutsideTheMemory) {
  victimCombines();
  Record record = forge(RecordKind::kStaged, OperationKind::kCombine, 2);
  record.owner = 2;
  record.rows = 1;
  record.place = uint64_t{1} << 40;
  record.bytes = 10;
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, RowsOfACombineThatAreTooFew) {
  victimCombines();
  Record record = forge(RecordKind::kStaged, OperationKind::kCombine, 2);
  record.owner = 2;
  record.rows = 1;
  record.place = 8192;
  record.bytes = 10;
  sendByMailbox(record);
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, SumsFromANodeMate) {
  victimCombines();
  Record record = forge(RecordKind::kPayload, OperationKind::kCombine, 2);
  record.rows = 1;
  record.bytes = 3;
  sendByMailbox(record, "xyz");
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, SumsThatAreNotTheNext) {
  victimCombines();
  Record record = forge(RecordKind::kPayload, OperationKind::kCombine, 0);
  record.offset = 1;
  record.rows = 1;
  record.bytes = 3;
  sendByNetwork(record, "xyz");
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, SumsOfTheWrongSizeBeforeTheCall) {
  Record record = forge(RecordKind::kPayload, OperationKind::kCombine, 0);
  record.rows = 1;
  record.bytes = 3;
  sendByNetwork(record, "xyz");
  ranks_.run([&](int rank) {
    Group& group = *other_[static_cast<size_t>(rank)];
    finish(ranks_.engine(rank), post(group, equalSizes(3, 1)));
  });
  victimCombines();
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, APieceOfAPlanThatIsMissing) {
  const auto builder = startPlan(ranks_.group(kVictim), routing_);
  posted_.operation =
      ranks_.group(kVictim).plan(builder, std::chrono::seconds(20), {});
  Record record = forge(RecordKind::kCast, OperationKind::kPlan, 0);
  record.offset = 10;
  record.rows = 1;
  record.bytes = 1;
  sendByNetwork(record, "x");
  expectGroupFails();
}

TEST_F(ForgedMoeRecordTest, AListOfAPlanThatMakesNoSense) {
  const auto builder = startPlan(ranks_.group(kVictim), routing_);
  posted_.operation =
      ranks_.group(kVictim).plan(builder, std::chrono::seconds(20), {});
  Record record = forge(RecordKind::kPosted, OperationKind::kPlan, 0);
  record.carrier = Carrier::kInline;
  record.rows = 3;
  record.sendBytes = 3;
  record.bytes = 3;
  sendByNetwork(record, "xyz");
  expectGroupFails();
}

}  // namespace
}  // namespace automoe::testing
