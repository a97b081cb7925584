// SPDX-License-Identifier: Apache-2.0
// The exception types of the core and the check that is on in every build.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace automoe {

/// Concatenates everything that can be streamed into one string.
template <typename... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

/// Base of all errors of the core.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The caller passed something that cannot be right, alone or against what
/// another rank passed.
class InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// A link or the operating system failed, or bytes that arrived make no sense.
class TransportError : public Error {
 public:
  using Error::Error;
};

/// An operation did not end before its deadline.
class TimeoutError : public Error {
 public:
  using Error::Error;
};

/// A rank of the group died or left; the text names it.
class PeerFailedError : public Error {
 public:
  using Error::Error;
};

namespace detail {
[[noreturn]] void throwCheckFailed(
    const char* condition,
    const char* file,
    int line,
    const std::string& message);
}  // namespace detail

}  // namespace automoe

/// Throws automoe::Error with the parts as its text when the condition is
/// false: for invariants, and on in every build.
#define AUTOMOE_CHECK(condition, ...)                                      \
  do {                                                                     \
    if (!(condition)) {                                                    \
      ::automoe::detail::throwCheckFailed(                                 \
          #condition, __FILE__, __LINE__, ::automoe::concat(__VA_ARGS__)); \
    }                                                                      \
  } while (false)
