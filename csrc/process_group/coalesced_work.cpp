// SPDX-License-Identifier: Apache-2.0
#include "process_group/coalesced_work.hpp"

#include <ATen/core/ivalue.h>

#include <algorithm>
#include <utility>

namespace automoe {

CoalescedWork::CoalescedWork(
    int rank, std::vector<c10::intrusive_ptr<c10d::Work>> works)
    : Work(rank, c10d::OpType::COALESCED), works_(std::move(works)) {}

bool CoalescedWork::isCompleted() {
  return std::all_of(works_.begin(), works_.end(), [](const auto& it) {
    return it->isCompleted();
  });
}

bool CoalescedWork::isSuccess() const {
  return std::all_of(works_.begin(), works_.end(), [](const auto& it) {
    return it->isSuccess();
  });
}

std::exception_ptr CoalescedWork::exception() const {
  for (const auto& work : works_) {
    if (const auto error = work->exception()) {
      return error;
    }
  }
  return nullptr;
}

std::vector<at::Tensor> CoalescedWork::result() {
  std::vector<at::Tensor> results;
  for (const auto& work : works_) {
    for (const at::Tensor& tensor : work->result()) {
      results.push_back(tensor);
    }
  }
  return results;
}

void CoalescedWork::synchronize() {
  for (const auto& work : works_) {
    work->synchronize();
  }
}

bool CoalescedWork::wait(std::chrono::milliseconds timeout) {
  using Clock = std::chrono::steady_clock;
  const auto until = Clock::now() + timeout;
  for (const auto& work : works_) {
    auto left = timeout;
    if (timeout != kNoTimeout) {
      left = std::max(
          std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now()),
          std::chrono::milliseconds(1));  // 0 means without an end
    }
    work->wait(left);
  }
  return true;
}

c10::intrusive_ptr<c10::ivalue::Future> CoalescedWork::getFuture() {
  const auto type = c10::ListType::create(c10::TensorType::get());
  auto whole = c10::make_intrusive<c10::ivalue::Future>(type);
  c10::List<c10::intrusive_ptr<c10::ivalue::Future>> parts(
      c10::FutureType::create(type));
  for (const auto& work : works_) {
    parts.push_back(work->getFuture());
  }
  std::vector<at::Tensor> results = result();
  c10::collectAll(parts)->addCallback(
      [whole, results = std::move(results)](c10::ivalue::Future& all) {
        if (all.hasError()) {
          whole->setError(all.exception_ptr());
          return;
        }
        for (const c10::IValue& part : all.value().toListRef()) {
          if (part.toFuture()->hasError()) {
            whole->setError(part.toFuture()->exception_ptr());
            return;
          }
        }
        whole->markCompleted(c10::IValue(results));
      });
  return whole;
}

}  // namespace automoe
