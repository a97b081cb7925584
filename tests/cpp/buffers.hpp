// SPDX-License-Identifier: Apache-2.0
// Memory for one all_to_all call, filled with what its receivers can check.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "ranks.hpp"

namespace automoe::testing {

/// bytes[source][destination]
using Sizes = std::vector<std::vector<uint64_t>>;

inline Sizes equalSizes(int size, uint64_t bytes) {
  const auto count = static_cast<size_t>(size);
  return Sizes(count, std::vector<uint64_t>(count, bytes));
}

/// Inputs and outputs of one call of one rank.
class Buffers {
 public:
  Buffers(const Sizes& sizes, int rank, int call = 0)
      : rank_(rank), call_(call) {
    for (size_t peer = 0; peer < sizes.size(); ++peer) {
      inputs_.emplace_back(sizes[static_cast<size_t>(rank)][peer]);
      outputs_.emplace_back(sizes[peer][static_cast<size_t>(rank)]);
      fill(inputs_[peer], rank, static_cast<int>(peer));
    }
  }

  AllToAllArguments arguments() {
    AllToAllArguments arguments;
    for (size_t peer = 0; peer < inputs_.size(); ++peer) {
      arguments.sends.push_back({inputs_[peer].data(), inputs_[peer].size()});
      arguments.receives.push_back(
          {outputs_[peer].data(), outputs_[peer].size()});
    }
    return arguments;
  }

  /// Every output holds exactly what its source has sent.
  void expectReceived() const {
    for (size_t peer = 0; peer < outputs_.size(); ++peer) {
      std::vector<std::byte> expected(outputs_[peer].size());
      fill(expected, static_cast<int>(peer), rank_);
      EXPECT_TRUE(outputs_[peer] == expected)
          << "rank " << rank_ << " got wrong bytes from rank " << peer;
    }
  }

 private:
  void fill(std::vector<std::byte>& block, int source, int target) const {
    uint64_t state = static_cast<uint64_t>((source * 97 + target) * 89 + call_);
    for (std::byte& it : block) {
      state = state * 6364136223846793005ULL + 1442695040888963407ULL;
      it = static_cast<std::byte>(state >> 56);
    }
  }

  int rank_;
  int call_;
  std::vector<std::vector<std::byte>> inputs_;
  std::vector<std::vector<std::byte>> outputs_;
};

/// A posted call with its memory, which stays until the engine has let go.
struct Posted {
  std::unique_ptr<Buffers> buffers;
  std::shared_ptr<Operation> operation;
};

inline Posted post(
    Group& group,
    const Sizes& sizes,
    int call = 0,
    std::chrono::milliseconds timeout = std::chrono::seconds(30)) {
  Posted posted;
  posted.buffers =
      std::make_unique<Buffers>(sizes, group.topology().rank(), call);
  posted.operation = group.allToAll(posted.buffers->arguments(), timeout, {});
  return posted;
}

/// Waits for the end and rethrows the operation's error.
inline void finish(Engine& engine, const Operation& operation) {
  if (!engine.wait(
          operation, Operation::Clock::now() + std::chrono::seconds(60))) {
    throw Error("an operation did not end: " + engine.waitsFor(operation));
  }
  if (operation.error() != nullptr) {
    std::rethrow_exception(operation.error());
  }
}

inline void finish(Engine& engine, const Posted& posted) {
  finish(engine, *posted.operation);
  posted.buffers->expectReceived();
}

/// The text of the exception of this type that `call` ends with.
template <typename Expected, typename Call>
std::string errorOf(const Call& call) {
  try {
    call();
  } catch (const Expected& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("another error: ") + error.what();
  }
  return "no error";
}

inline void expectContains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos)
      << "expected \"" << part << "\" in \"" << text << "\"";
}

}  // namespace automoe::testing
