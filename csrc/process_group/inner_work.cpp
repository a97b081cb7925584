// SPDX-License-Identifier: Apache-2.0
#include "process_group/inner_work.hpp"

#include <thread>
#include <utility>

#include "process_group/common/patient_wait.hpp"
#include "process_group/work_automoe.hpp"

namespace automoe {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

constexpr auto kLook = milliseconds(200);
// Gloo may see a broken connection before the engine has named the rank.
constexpr auto kNaming = milliseconds(500);

}  // namespace

InnerWork::InnerWork(
    c10::intrusive_ptr<c10d::Work> work,
    std::shared_ptr<Engine> engine,
    std::shared_ptr<Group> group,
    bool polled)
    : Work(-1, work->retrieveOpType()),
      work_(std::move(work)),
      engine_(std::move(engine)),
      group_(std::move(group)),
      polled_(polled) {}

bool InnerWork::wait(milliseconds timeout) {
  if (!polled_) {
    try {
      return work_->wait(timeout);
    } catch (...) {
      throwNamed(std::current_exception());
    }
  }
  return waitPatiently(
      kLook,
      timeout == kNoTimeout ? Clock::time_point::max() : Clock::now() + timeout,
      [this](milliseconds portion) { return work_->wait(portion); },
      [this] { return work_->isCompleted(); },
      [this] { throwNamed(std::current_exception()); },
      [this] {
        if (const auto failure = group_->failure()) {
          throwForTorch(failure);
        }
      });
}

void InnerWork::throwNamed(std::exception_ptr error) {
  const auto until = Clock::now() + kNaming;
  while (group_->failure() == nullptr && Clock::now() < until) {
    std::this_thread::sleep_for(milliseconds(10));
  }
  if (const auto failure = group_->failure()) {
    throwForTorch(failure);
  }
  // Of its own: an argument that Gloo refuses, for example.
  std::rethrow_exception(error);
}

bool InnerWork::isCompleted() {
  return work_->isCompleted() || group_->failure() != nullptr;
}

bool InnerWork::isSuccess() const {
  return work_->isSuccess();
}

std::exception_ptr InnerWork::exception() const {
  return work_->exception();
}

int InnerWork::sourceRank() const {
  return work_->sourceRank();
}

std::vector<at::Tensor> InnerWork::result() {
  return work_->result();
}

void InnerWork::synchronize() {
  work_->synchronize();
}

void InnerWork::abort() {
  work_->abort();
}

c10::intrusive_ptr<c10::ivalue::Future> InnerWork::getFuture() {
  return work_->getFuture();
}

float InnerWork::getDuration() const {
  return work_->getDuration();
}

uint64_t InnerWork::getSequencenumber() const {
  return work_->getSequencenumber();
}

}  // namespace automoe
