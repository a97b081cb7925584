// SPDX-License-Identifier: Apache-2.0
// Plain values as Python's pickle, protocol 2; loading one runs no code.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

namespace automoe {

/// Values follow each other as they are written; a container is what stands
/// between its begin and its end. In a dict, keys and values take turns.
class PickleWriter {
 public:
  PickleWriter() : bytes_("\x80\x02") {}

  void beginDict() { bytes_ += "}("; }
  void endDict() { bytes_ += 'u'; }
  void beginList() { bytes_ += "]("; }
  void endList() { bytes_ += 'e'; }
  /// After two values, which become one.
  void pair() { bytes_ += '\x86'; }

  void none() { bytes_ += 'N'; }
  void boolean(bool value) { bytes_ += value ? '\x88' : '\x89'; }

  void integer(int64_t value) {
    bytes_ += "\x8a\x08";
    littleEndian(static_cast<uint64_t>(value), 8);
  }

  void real(double value) {
    bytes_ += 'G';
    const auto bits = std::bit_cast<uint64_t>(value);
    for (int shift = 56; shift >= 0;
         shift -= 8) {  // the one that is big-endian
      bytes_ += static_cast<char>(bits >> shift & 0xff);
    }
  }

  /// UTF-8 of less than 4 GB.
  void text(std::string_view value) {
    bytes_ += 'X';
    littleEndian(value.size(), 4);
    bytes_ += value;
  }

  /// The whole pickle. Nothing may be written any more.
  std::string finish() {
    bytes_ += '.';
    return std::move(bytes_);
  }

 private:
  void littleEndian(uint64_t value, int size) {
    for (int i = 0; i < size; ++i) {
      bytes_ += static_cast<char>(value >> 8 * i & 0xff);
    }
  }

  std::string bytes_;
};

}  // namespace automoe
