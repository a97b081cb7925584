// SPDX-License-Identifier: Apache-2.0
// Memory for the emulated kernels, at a chosen distance from an aligned
// address.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <random>
#include <vector>

#include "numbers.hpp"

namespace automoe::kernels {

/// Begins `offset` bytes behind a multiple of 64 and ends with its last byte,
/// which AddressSanitizer knows.
class Memory {
 public:
  Memory(size_t bytes, size_t offset)
      : all_(static_cast<std::byte*>(
            ::operator new(offset + bytes, std::align_val_t{64}))),
        offset_(offset),
        bytes_(bytes) {
    std::memset(all_, kFill, offset + bytes);
  }
  Memory(const Bytes& bytes, size_t offset) : Memory(bytes.size(), offset) {
    std::copy(bytes.begin(), bytes.end(), data());
  }
  Memory(Memory&& other) noexcept
      : all_(other.all_), offset_(other.offset_), bytes_(other.bytes_) {
    other.all_ = nullptr;
  }
  Memory& operator=(Memory&&) = delete;
  ~Memory() { ::operator delete(all_, std::align_val_t{64}); }

  std::byte* data() { return all_ + offset_; }
  size_t size() const { return bytes_; }
  Bytes copy() const { return {all_ + offset_, all_ + offset_ + bytes_}; }
  /// Nothing was written below the memory.
  bool isIntact() const {
    return std::all_of(all_, all_ + offset_, [](std::byte it) {
      return it == std::byte{kFill};
    });
  }

 private:
  static constexpr unsigned char kFill = 0xA5;

  std::byte* all_;
  size_t offset_;
  size_t bytes_;
};

/// Offsets whose addresses allow loads of 16, 8, 4, 2 and 1 bytes.
constexpr size_t kOffsets[] = {0, 16, 8, 4, 2, 1, 3};

template <class Choices>
auto oneOf(std::mt19937& random, const Choices& choices) {
  return *(std::begin(choices) + random() % std::size(choices));
}

inline Bytes randomBytes(std::mt19937& random, size_t count) {
  Bytes bytes(count);
  for (std::byte& byte : bytes) {
    byte = static_cast<std::byte>(random());
  }
  return bytes;
}

/// Values of all kinds; see fill().
inline Bytes randomValues(std::mt19937& random, DType dtype, size_t count) {
  Values values(count * elementBytes(dtype));
  if (count > 0) {
    withNumber(
        dtype, [&](auto number) { fill<decltype(number)>(random, values); });
  }
  return values.copy();
}

inline DType sumTypeOf(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

}  // namespace automoe::kernels
