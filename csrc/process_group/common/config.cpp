// SPDX-License-Identifier: Apache-2.0
#include "process_group/common/config.hpp"

#include <cstdlib>

#include "process_group/common/error.hpp"

namespace automoe {
namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::string() : std::string(value);
}

LogLevel parseLogLevel(const std::string& text) {
  if (text.empty() || text == "warn") {
    return LogLevel::kWarn;
  }
  if (text == "info") {
    return LogLevel::kInfo;
  }
  if (text == "debug") {
    return LogLevel::kDebug;
  }
  throw InvalidArgument(
      concat("AUTOMOE_LOG is '", text, "', expected debug, info or warn"));
}

bool parseSwitch(const char* name, bool byDefault) {
  const std::string text = variable(name);
  if (text.empty()) {
    return byDefault;
  }
  if (text != "0" && text != "1") {
    throw InvalidArgument(concat(name, " is '", text, "', expected 0 or 1"));
  }
  return text == "1";
}

}  // namespace

Config Config::fromEnvironment() {
  Config config;
  config.node = variable("AUTOMOE_NODE");
  config.interface = variable("AUTOMOE_INTERFACE");
  config.logLevel = parseLogLevel(variable("AUTOMOE_LOG"));
  config.mergeRows = parseSwitch("AUTOMOE_MERGE_ROWS", true);
  config.ncclSharesGpus = variable("NCCL_MULTI_RANK_GPU_ENABLE") == "1";
  config.masterAddress = variable("MASTER_ADDR");
  return config;
}

}  // namespace automoe
