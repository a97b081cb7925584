// SPDX-License-Identifier: Apache-2.0
// The kernels of torch that the tests capture into graphs.
#include <algorithm>
#include <cstring>

#include "cuda_library/streams.hpp"

namespace {

using automoe::cuda_library::streamOf;
using automoe::cuda_library::Work;

struct Bfloat16 {
  uint16_t bits;

  explicit Bfloat16(float value) {
    uint32_t wide = 0;
    std::memcpy(&wide, &value, sizeof(wide));
    const uint32_t toNearestEven = 0x7FFF + (wide >> 16 & 1);
    bits = static_cast<uint16_t>(
        value != value ? 0x7FC0 : (wide + toNearestEven) >> 16);
  }
  explicit operator float() const {
    const uint32_t wide = uint32_t{bits} << 16;
    float value = 0;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
  }
};

/// to = from * factor, or factor where `from` is null.
template <class T>
Work scale(void* to, const void* from, size_t count, double factor) {
  return [=] {
    for (size_t i = 0; i < count; ++i) {
      const float value =
          from == nullptr ? 1
                          : static_cast<float>(static_cast<const T*>(from)[i]);
      static_cast<T*>(to)[i] = T(value * static_cast<float>(factor));
    }
    return true;
  };
}

}  // namespace

extern "C" {

/// Of elements of 2 bytes (bfloat16) or 4 (float).
void automoeScale(
    cudaStream_t stream,
    void* to,
    const void* from,
    size_t count,
    int elementBytes,
    double factor) {
  streamOf(stream).enqueue(
      elementBytes == 2 ? scale<Bfloat16>(to, from, count, factor)
                        : scale<float>(to, from, count, factor));
}

void automoeClamp(
    cudaStream_t stream,
    int64_t* to,
    const int64_t* from,
    size_t count,
    int64_t least,
    int64_t most) {
  streamOf(stream).enqueue([=] {
    std::transform(from, from + count, to, [=](int64_t value) {
      return std::clamp(value, least, most);
    });
    return true;
  });
}

void automoeNarrow(
    cudaStream_t stream, int32_t* to, const int64_t* from, size_t count) {
  streamOf(stream).enqueue([=] {
    std::transform(from, from + count, to, [](int64_t value) {
      return static_cast<int32_t>(value);
    });
    return true;
  });
}
}
