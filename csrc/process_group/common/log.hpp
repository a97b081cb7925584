// SPDX-License-Identifier: Apache-2.0
// One logger: a line to stderr, with the rank once it is known.
#pragma once

#include <string>

#include "process_group/common/config.hpp"

namespace automoe {

/// Sets the least level that is written. Thread-safe.
void setLogLevel(LogLevel level);

/// Prefix that names this process in every line, e.g. "rank 3". Thread-safe.
void setLogName(const std::string& name);

/// True when a line of this level would be written.
bool logEnabled(LogLevel level);

/// Writes one line; never throws. Thread-safe.
void log(LogLevel level, const std::string& line) noexcept;

}  // namespace automoe
