// SPDX-License-Identifier: Apache-2.0
#include "process_group/memory/copy_rates.hpp"

#include <gtest/gtest.h>

namespace automoe {
namespace {

TEST(CopyRatesTest, TheFasterWayIsPreferred) {
  EXPECT_TRUE((CopyRates{.staged = 5, .crossMemory = 8}.preferCrossMemory()));
  EXPECT_FALSE((CopyRates{.staged = 8, .crossMemory = 5}.preferCrossMemory()));
  EXPECT_FALSE((CopyRates{.staged = 0, .crossMemory = 0}.preferCrossMemory()));
}

TEST(CopyRatesTest, DescriptionHasBothFiguresOrSaysWhatIsMissing) {
  const std::string both =
      CopyRates{.staged = 9.04, .crossMemory = 6.25}.describe();
  EXPECT_NE(both.find("9.0 GB/s"), std::string::npos) << both;
  EXPECT_NE(both.find("6.3 GB/s"), std::string::npos) << both;
  const std::string one = CopyRates{.staged = 9, .crossMemory = 0}.describe();
  EXPECT_NE(one.find("not allowed"), std::string::npos) << one;
}

TEST(CopyRatesTest, MeasurementIsOfThisMachine) {
  const CopyRates rates = measureCopyRates();
  EXPECT_GT(rates.staged, 0.01);
  EXPECT_LT(rates.staged, 10000);
  // A process may always read itself, unless the system call is filtered.
  EXPECT_GE(rates.crossMemory, 0);
}

}  // namespace
}  // namespace automoe
