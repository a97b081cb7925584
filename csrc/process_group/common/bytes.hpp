// SPDX-License-Identifier: Apache-2.0
// Bounded writing and reading of little-endian fields, for everything that a
// peer sends: no length or index of a peer is used unchecked.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

#include "process_group/common/error.hpp"

namespace automoe {

static_assert(
    std::endian::native == std::endian::little,
    "records are little-endian and written without conversion");

class ByteWriter {
 public:
  template <typename T>
    requires std::is_trivially_copyable_v<T>
  void put(const T& value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(T));
  }
  void putString(std::string_view text) {
    put(static_cast<uint32_t>(text.size()));
    bytes_.append(text);
  }
  std::string take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

/// Throws TransportError when the bytes end before a field does.
class ByteReader {
 public:
  ByteReader(const void* data, size_t size)
      : data_(static_cast<const char*>(data)), size_(size) {}
  explicit ByteReader(std::string_view bytes)
      : ByteReader(bytes.data(), bytes.size()) {}

  template <typename T>
    requires std::is_trivially_copyable_v<T>
  T get() {
    T value;
    std::memcpy(&value, take(sizeof(T)), sizeof(T));
    return value;
  }
  std::string getString() {
    const auto size = get<uint32_t>();
    return std::string(take(size), size);
  }
  /// The next `size` bytes, in place.
  const char* take(size_t size) {
    if (size > size_ - position_) {
      throw TransportError(concat(
          "a message ends early: ",
          size,
          " more bytes expected, ",
          size_ - position_,
          " left"));
    }
    const char* field = data_ + position_;
    position_ += size;
    return field;
  }
  size_t remaining() const { return size_ - position_; }

 private:
  const char* data_;
  size_t size_;
  size_t position_ = 0;
};

}  // namespace automoe
