// SPDX-License-Identifier: Apache-2.0
#include "process_group/common/log.hpp"

#include <unistd.h>

#include <atomic>
#include <mutex>

namespace automoe {
namespace {

std::atomic<LogLevel> leastLevel{LogLevel::kWarn};
std::mutex nameMutex;
// Leaked on purpose: threads may log while the process exits.
std::string& processName() {
  static auto* name = new std::string();
  return *name;
}

const char* levelName(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "debug";
    case LogLevel::kInfo:
      return "info";
    case LogLevel::kWarn:
      return "warn";
  }
  return "?";
}

}  // namespace

void setLogLevel(LogLevel level) {
  leastLevel = level;
}

void setLogName(const std::string& name) {
  const std::lock_guard lock(nameMutex);
  processName() = name;
}

bool logEnabled(LogLevel level) {
  return level >= leastLevel.load(std::memory_order_relaxed);
}

void log(LogLevel level, const std::string& line) noexcept {
  if (!logEnabled(level)) {
    return;
  }
  try {
    std::string text = "[automoe ";
    {
      const std::lock_guard lock(nameMutex);
      text += processName().empty() ? "" : processName() + " ";
    }
    text += levelName(level);
    text += "] " + line + "\n";
    // One write, so that lines of several ranks do not interleave.
    (void)!::write(STDERR_FILENO, text.data(), text.size());
  } catch (...) {
    // A line that cannot be written is not worth an error.
  }
}

}  // namespace automoe
