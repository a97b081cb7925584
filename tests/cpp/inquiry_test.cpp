// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/inquiry.hpp"

#include <gtest/gtest.h>

namespace automoe::testing {
namespace {

using std::chrono::milliseconds;

TEST(InquiryTest, IsOverWhenAllHaveAnsweredOrTimeHasPassed) {
  const auto now = Inquiry::Clock::now();
  Inquiry asked(3, 0, now);
  EXPECT_FALSE(asked.over(now));
  EXPECT_TRUE(asked.over(now + milliseconds(600)));
  asked.answered(1, true);
  EXPECT_FALSE(asked.over(now));
  asked.answered(2, false);
  EXPECT_TRUE(asked.over(now));
}

TEST(InquiryTest, SaysWhoHasNotCalledAndWhoIsSilent) {
  const auto now = Inquiry::Clock::now();
  Inquiry all(2, 1, now);
  all.answered(0, true);
  EXPECT_EQ(all.result(), "all ranks have called it");
  Inquiry some(5, 0, now);
  some.answered(1, false);
  some.answered(2, true);
  some.answered(4, false);
  EXPECT_EQ(
      some.result(), "ranks 1, 4 have not called it; rank 3 has not answered");
}

}  // namespace
}  // namespace automoe::testing
