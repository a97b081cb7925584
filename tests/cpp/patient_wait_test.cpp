// SPDX-License-Identifier: Apache-2.0
#include "process_group/common/patient_wait.hpp"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

namespace automoe {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

constexpr auto kForever = Clock::time_point::max();

/// Work that is done after some portions; a portion before that times out.
struct FakeWork {
  int portionsLeft = 0;
  bool doneWhileTimingOut = false;
  bool fails = false;
  int looks = 0;
  int failures = 0;

  bool isDone() const { return portionsLeft == 0; }

  bool wait(milliseconds) {
    if (portionsLeft > 0) {
      portionsLeft = doneWhileTimingOut ? 0 : portionsLeft - 1;
      throw std::runtime_error("timed out");
    }
    if (fails) {
      throw std::runtime_error("failed");
    }
    return true;
  }

  bool waitFor(Clock::time_point until) {
    return waitPatiently(
        milliseconds(1),
        until,
        [this](milliseconds portion) { return wait(portion); },
        [this] { return isDone(); },
        [this] { failures += 1; },
        [this] { looks += 1; });
  }
};

std::string errorOf(FakeWork& work, Clock::time_point until) {
  try {
    work.waitFor(until);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "none";
}

TEST(PatientWait, ReturnsWhatTheWorkReturns) {
  FakeWork work;
  EXPECT_TRUE(work.waitFor(kForever));
  EXPECT_EQ(work.looks, 0);
}

TEST(PatientWait, LooksAroundBetweenPortions) {
  FakeWork work{.portionsLeft = 3};
  EXPECT_TRUE(work.waitFor(kForever));
  EXPECT_EQ(work.looks, 3);
}

TEST(PatientWait, WorkThatIsDoneJustAfterItsPortionHasNotFailed) {
  FakeWork work{.portionsLeft = 5, .doneWhileTimingOut = true};
  EXPECT_TRUE(work.waitFor(kForever));
  EXPECT_EQ(work.failures, 0);
}

TEST(PatientWait, NorDoesADeadlineInThatMomentFailIt) {
  FakeWork work{.portionsLeft = 5, .doneWhileTimingOut = true};
  EXPECT_TRUE(work.waitFor(Clock::now() - milliseconds(1)));
}

TEST(PatientWait, AFailureIsTheWorksOwn) {
  FakeWork work{.portionsLeft = 2, .fails = true};
  EXPECT_EQ(errorOf(work, kForever), "failed");
  EXPECT_EQ(work.failures, 1);
}

TEST(PatientWait, EndsAtItsDeadline) {
  FakeWork work{.portionsLeft = 1 << 30};
  EXPECT_EQ(errorOf(work, Clock::now() + milliseconds(20)), "timed out");
  EXPECT_EQ(work.failures, 0);
}

}  // namespace
}  // namespace automoe
