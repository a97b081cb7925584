// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_agreement.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <memory>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>

#include "process_group/exchange/scheduled.hpp"
#include "process_group/exchange/schedules.hpp"

namespace automoe {
namespace {

using std::chrono::milliseconds;

// Apart from those of handles, users and barriers.
constexpr uint64_t kNewsTag = uint64_t{1} << 34;
constexpr auto kPoll = milliseconds(1);
// A step may fail by the timeout, on a rank that began it so much later; who
// was quick waits for the report.
constexpr auto kLater = milliseconds(10'000);

/// kInterrupted: it has failed because another rank had.
enum class Outcome : uint32_t { kDone, kFailed, kInterrupted };

/// What a rank tells all others of its step.
struct Report {
  DeviceMemory::Offer offer;
  Outcome outcome = Outcome::kDone;
  std::array<char, 508> fault = {};  // ends with a zero

  void fail(std::string_view text, bool interrupted) {
    outcome = interrupted ? Outcome::kInterrupted : Outcome::kFailed;
    const size_t bytes = std::min(text.size(), fault.size() - 1);
    std::memcpy(fault.data(), text.data(), bytes);
  }
};
static_assert(std::is_trivially_copyable_v<Report>);

/// Reports of all ranks; the engine may use them after a failure.
struct Reports {
  Report own;
  std::vector<Report> all;
};

/// The fault of the first rank that has one of its own, or else of the first.
void throwFault(std::vector<Report>& all) {
  for (const Outcome outcome : {Outcome::kFailed, Outcome::kInterrupted}) {
    for (size_t rank = 0; rank < all.size(); ++rank) {
      if (all[rank].outcome == outcome) {
        all[rank].fault.back() = 0;
        throw DeviceError(concat("rank ", rank, ": ", all[rank].fault.data()));
      }
    }
  }
}

/// Mails between this rank and others, by which each hears at once that the
/// other's step is over, and whether it has failed.
class StepNews {
 public:
  StepNews(
      Engine& engine,
      Group& group,
      std::span<const int> with,
      milliseconds timeout)
      : engine_(engine),
        group_(group),
        with_(with.begin(), with.end()),
        timeout_(timeout),
        told_(std::make_shared<Told>()) {
    told_->failed.resize(with_.size());
    for (size_t i = 0; i < with_.size(); ++i) {
      received_.push_back(group_.receive(
          mailOf(with_[i], told_->failed[i]), timeout_, keeping()));
    }
  }

  /// Whether one of the others has failed, or the group.
  bool anyFailed() const {
    for (size_t i = 0; i < received_.size(); ++i) {
      if (received_[i]->finished() &&
          (received_[i]->error() != nullptr || told_->failed[i] != 0)) {
        return true;
      }
    }
    return false;
  }
  /// Tells the others, and waits for what they tell. Throws the failure of the
  /// group.
  void exchange(bool failed) {
    told_->own = failed ? 1 : 0;
    std::vector<std::shared_ptr<PairOperation>> mails = received_;
    for (const int rank : with_) {
      mails.push_back(
          group_.send(mailOf(rank, told_->own), timeout_, keeping()));
    }
    for (const auto& mail : mails) {
      engine_.wait(*mail, Engine::Clock::time_point::max());
      if (mail->error() != nullptr) {
        std::rethrow_exception(mail->error());
      }
    }
  }

 private:
  struct Told {
    uint8_t own = 0;
    std::vector<uint8_t> failed;
  };

  static PairArguments mailOf(int rank, uint8_t& word) {
    PairArguments mail;
    mail.peer = rank;
    mail.tag = kNewsTag;
    mail.data = reinterpret_cast<std::byte*>(&word);
    mail.bytes = sizeof(word);
    return mail;
  }
  OperationCallbacks keeping() const {
    OperationCallbacks callbacks;
    callbacks.released = [told = told_] {};
    return callbacks;
  }

  Engine& engine_;
  Group& group_;
  const std::vector<int> with_;
  const milliseconds timeout_;
  const std::shared_ptr<Told> told_;
  std::vector<std::shared_ptr<PairOperation>> received_;
};

/// A thread that calls `act` once `when` is true, while this lives.
class Watch {
 public:
  Watch(std::function<bool()> when, std::function<void()> act)
      : thread_([this, when = std::move(when), act = std::move(act)] {
          while (!over_) {
            if (when()) {
              act();
              return;
            }
            std::this_thread::sleep_for(kPoll);
          }
        }) {}
  ~Watch() {
    over_ = true;
    thread_.join();
  }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

 private:
  std::atomic<bool> over_{false};
  std::thread thread_;
};

}  // namespace

std::vector<DeviceMemory::Offer> DeviceAgreement::gather(
    const std::function<DeviceMemory::Offer()>& step) {
  return gather(step, false);
}

std::vector<DeviceMemory::Offer> DeviceAgreement::gather(
    const std::function<DeviceMemory::Offer()>& step,
    const std::atomic<bool>& interrupted) {
  const auto reports = std::make_shared<Reports>();
  try {
    reports->own.offer = step();
  } catch (const std::exception& error) {
    reports->own.fail(error.what(), interrupted);
  }
  const Topology& topology = group_.topology();
  reports->all.resize(static_cast<size_t>(topology.size()));
  std::vector<Block> to;
  for (Report& report : reports->all) {
    to.push_back({reinterpret_cast<std::byte*>(&report), sizeof(report)});
  }
  ScheduledArguments arguments;
  arguments.schedule = makeAllGather(
      topology,
      {reinterpret_cast<const std::byte*>(&reports->own), sizeof(Report)},
      to);
  arguments.description.operation = OperationKind::kAllGather;
  arguments.description.total = to.size() * sizeof(Report);
  OperationCallbacks callbacks;
  callbacks.released = [reports] {};
  const auto operation = group_.collective(
      std::move(arguments),
      timeout_ + std::min(timeout_, kLater),
      std::move(callbacks));
  engine_.wait(*operation, Engine::Clock::time_point::max());
  if (operation->error() != nullptr) {
    std::rethrow_exception(operation->error());
  }
  throwFault(reports->all);
  std::vector<DeviceMemory::Offer> offers;
  for (const Report& report : reports->all) {
    offers.push_back(report.offer);
  }
  return offers;
}

void DeviceAgreement::take(const std::function<void()>& step) {
  gather([&] {
    step();
    return DeviceMemory::Offer();
  });
}

void DeviceAgreement::takeWith(
    std::span<const int> with,
    const std::function<void()>& step,
    const std::function<void()>& interrupt) {
  std::atomic<bool> interrupted{false};
  const auto watched = [&] {
    // Longer than a step takes that fails by its own timeout.
    StepNews news(engine_, group_, with, 2 * timeout_);
    std::exception_ptr fault;
    {
      const Watch watch(
          [&] { return news.anyFailed(); },
          [&] {
            interrupted = true;
            interrupt();
          });
      try {
        step();
      } catch (const std::exception&) {
        fault = std::current_exception();
      }
    }
    news.exchange(fault != nullptr);
    if (fault != nullptr) {
      std::rethrow_exception(fault);
    }
    return DeviceMemory::Offer();
  };
  gather(watched, interrupted);
}

}  // namespace automoe
