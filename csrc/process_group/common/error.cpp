// SPDX-License-Identifier: Apache-2.0
#include "process_group/common/error.hpp"

#include <cstring>

namespace automoe::detail {

void throwCheckFailed(
    const char* condition,
    const char* file,
    int line,
    const std::string& message) {
  const char* slash = std::strrchr(file, '/');
  throw Error(concat(
      message,
      " [",
      condition,
      " is false at ",
      slash == nullptr ? file : slash + 1,
      ":",
      line,
      "]"));
}

}  // namespace automoe::detail
