// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/inquiry.hpp"

#include <algorithm>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

constexpr auto kPatience = std::chrono::milliseconds(500);

std::string ranksText(const std::vector<size_t>& ranks, const char* one) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) {
    text += concat(i == 0 ? "" : ", ", ranks[i]);
  }
  return concat(text, ranks.size() == 1 ? " has" : " have", one);
}

}  // namespace

Inquiry::Inquiry(int size, int ownRank, Clock::time_point now)
    : called_(static_cast<size_t>(size)), until_(now + kPatience) {
  called_[static_cast<size_t>(ownRank)] = true;
}

void Inquiry::answered(int rank, bool called) {
  called_[static_cast<size_t>(rank)] = called;
}

bool Inquiry::over(Clock::time_point now) const {
  return now > until_ ||
         std::all_of(called_.begin(), called_.end(), [](const auto& it) {
           return it.has_value();
         });
}

std::string Inquiry::result() const {
  std::vector<size_t> missing;
  std::vector<size_t> silent;
  for (size_t rank = 0; rank < called_.size(); ++rank) {
    if (!called_[rank].has_value()) {
      silent.push_back(rank);
    } else if (!*called_[rank]) {
      missing.push_back(rank);
    }
  }
  if (missing.empty() && silent.empty()) {
    return "all ranks have called it";
  }
  std::string text;
  if (!missing.empty()) {
    text = ranksText(missing, " not called it");
  }
  if (!silent.empty()) {
    text += text.empty() ? "" : "; ";
    text += ranksText(silent, " not answered");
  }
  return text;
}

}  // namespace automoe
