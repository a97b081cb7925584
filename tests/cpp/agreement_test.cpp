// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/agreement.hpp"

#include <gtest/gtest.h>

namespace automoe {
namespace {

const char* nameOf(uint8_t dtype) {
  return dtype == 6 ? "Float" : "Long";
}

PostedSide side(
    int rank, uint64_t sends, uint64_t receives, uint8_t dtype = 6) {
  return {
      .rank = rank,
      .sendBytes = sends,
      .receiveBytes = receives,
      .dtype = dtype};
}

TEST(AgreementTest, EqualSizesAgree) {
  EXPECT_EQ(findDisagreement(side(1, 8, 16), side(2, 16, 8), 4, nameOf), "");
  EXPECT_EQ(findDisagreement(side(1, 0, 0), side(2, 0, 0), 4, nameOf), "");
}

TEST(AgreementTest, BothSidesSayTheSameWords) {
  // Both directions disagree, and each side sees the other as "theirs".
  const PostedSide low = side(3, 68, 12);
  const PostedSide high = side(5, 20, 64);
  const std::string text = findDisagreement(low, high, 4, nameOf);
  EXPECT_EQ(text, findDisagreement(high, low, 4, nameOf));
  EXPECT_NE(
      text.find("rank 3 sends 68 bytes (17 elements of 4) to rank 5"),
      std::string::npos)
      << text;
  EXPECT_NE(
      text.find("rank 5 expects 64 bytes (16 elements of 4)"),
      std::string::npos)
      << text;
}

TEST(AgreementTest, ZeroAgainstNonZeroIsADisagreement) {
  const std::string text =
      findDisagreement(side(0, 0, 0), side(1, 0, 4), 4, nameOf);
  EXPECT_NE(text.find("rank 0 sends 0 bytes"), std::string::npos) << text;
}

TEST(AgreementTest, DtypesMatterWhereAnythingIsSent) {
  const std::string text =
      findDisagreement(side(0, 8, 8, 6), side(1, 8, 8, 4), 4, nameOf);
  EXPECT_NE(text.find("rank 0 posted tensors of Float"), std::string::npos);
  EXPECT_NE(text.find("rank 1 of Long"), std::string::npos) << text;
  EXPECT_EQ(
      findDisagreement(side(0, 0, 0, 6), side(1, 0, 0, 4), 4, nameOf), "");
}

TEST(AgreementTest, BothSidesNameWhoCaptures) {
  Record eager;
  eager.source = 0;
  eager.rows = graphUseOf(false, true);
  Record captured;
  captured.source = 1;
  captured.rows = graphUseOf(true, false);
  const std::string text = findGraphDisagreement(eager, captured);
  EXPECT_EQ(text, findGraphDisagreement(captured, eager));
  EXPECT_EQ(
      text,
      "rank 1 captures this call into a graph, rank 0 does not; all ranks must "
      "capture the same calls, and replay them together");
  captured.rows = graphUseOf(false, false);
  EXPECT_EQ(
      findGraphDisagreement(captured, eager),
      "rank 0 has fenced: yes, rank 1 has no; they must agree");
  EXPECT_EQ(findGraphDisagreement(eager, eager), "");
}

}  // namespace
}  // namespace automoe
