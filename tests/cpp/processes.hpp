// SPDX-License-Identifier: Apache-2.0
// Ids of processes, and what this one has open and runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <sstream>
#include <string>

namespace automoe::testing {

/// An id that no other process of this machine uses: names are made of it.
inline uint64_t newProcess() {
  std::random_device random;
  return uint64_t{random()} << 32 | random();
}

inline std::ptrdiff_t countDescriptors() {
  const std::filesystem::directory_iterator entries("/proc/self/fd");
  return std::distance(begin(entries), end(entries));
}

/// Without threads that are ending: one may be joined, yet listed for a moment.
inline std::ptrdiff_t countThreads() {
  constexpr unsigned kExiting = 0x4;  // PF_EXITING of the kernel
  std::ptrdiff_t count = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator("/proc/self/task")) {
    std::string line;
    std::getline(std::ifstream(entry.path() / "stat"), line);
    // "id (name) state parent group session terminal its_group flags ..."
    unsigned flags = kExiting;  // of one that is gone meanwhile
    const size_t name = line.rfind(')');
    if (name != std::string::npos) {
      std::istringstream fields(line.substr(name + 1));
      std::string skipped;
      for (int i = 0; i < 6; ++i) {
        fields >> skipped;
      }
      fields >> flags;
    }
    count += (flags & kExiting) == 0 ? 1 : 0;
  }
  return count;
}

}  // namespace automoe::testing
