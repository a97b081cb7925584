// SPDX-License-Identifier: Apache-2.0
// One template over number types and operations; loops that the compiler makes
// vectors of.
#include "kernels/elementwise.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "kernels/reduce.hpp"
#include "kernels/row_math.hpp"

namespace automoe::kernels {
namespace {

/// Sums of this many bytes stay in the nearest cache while inputs stream past.
constexpr size_t kTileBytes = 4096;

/// As Format, for integers: they are computed in their own type.
template <class T>
struct IntegerFormat {
  using Stored = T;
  using Sum = T;
  static Sum widen(Stored value) { return value; }
  static Stored round(Sum value) { return value; }
};

struct BoolFormat {
  using Stored = uint8_t;
  using Sum = uint8_t;
  static Sum widen(Stored value) { return value != 0 ? 1 : 0; }
  static Stored round(Sum value) { return value; }
};

struct Sum {
  template <class T>
  static T of(T a, T b) {
    // A type smaller than int would be computed in int, where it may overflow.
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(1U * a + b);
    } else {
      return a + b;
    }
  }
};

struct Product {
  template <class T>
  static T of(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(1U * a * b);
    } else {
      return a * b;
    }
  }
};

/// The one of the two that a comparison chooses; a NaN if there is one.
template <class T>
T choose(bool first, T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return first ? a : b;
  } else {
    // Both operands are computed, so that a loop over this has no branch.
    return (static_cast<int>(first) | static_cast<int>(a != a)) != 0 ? a : b;
  }
}

struct Min {
  template <class T>
  static T of(T a, T b) {
    return choose(a < b, a, b);
  }
};

struct Max {
  template <class T>
  static T of(T a, T b) {
    return choose(a > b, a, b);
  }
};

struct BitAnd {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(a & b);
  }
};

struct BitOr {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(a | b);
  }
};

struct BitXor {
  template <class T>
  static T of(T a, T b) {
    return static_cast<T>(a ^ b);
  }
};

template <class T>
T valueAt(const std::byte* from, size_t i) {
  T value;
  std::memcpy(&value, from + i * sizeof(T), sizeof(T));
  return value;
}

template <class T>
void setValue(std::byte* to, size_t i, T value) {
  std::memcpy(to + i * sizeof(T), &value, sizeof(T));
}

/// In the order of ElementType.
constexpr struct {
  const char* name;
  size_t bytes;
} kTypes[] = {
    {"bool", 1},
    {"int8", 1},
    {"uint8", 1},
    {"int16", 2},
    {"uint16", 2},
    {"int32", 4},
    {"uint32", 4},
    {"int64", 8},
    {"uint64", 8},
    {"float16", 2},
    {"bfloat16", 2},
    {"float32", 4},
    {"float64", 8}};

/// In the order of ReduceOperation.
constexpr const char* kOperationNames[] = {
    "SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"};

struct Arguments {
  std::byte* to;
  std::span<const std::byte* const> inputs;
  size_t bytes;
};

/// Two arrays need no memory for what is between.
template <class Chosen, class Operation>
void reducePair(const Arguments& all) {
  using Stored = typename Chosen::Stored;
  const std::byte* a = all.inputs[0];
  const std::byte* b = all.inputs[1];
  std::byte* to = all.to;
  const size_t count = all.bytes / sizeof(Stored);
  // `to` may be an input, but elements do not depend on one another.
#pragma GCC ivdep
  for (size_t i = 0; i < count; ++i) {
    const auto result = Operation::of(
        Chosen::widen(valueAt<Stored>(a, i)),
        Chosen::widen(valueAt<Stored>(b, i)));
    setValue(to, i, Chosen::round(result));
  }
}

// The loops over a tile. They are not inlined: GCC would join those of two
// inputs, and then make no vectors.

template <class Chosen>
[[gnu::noinline]] void loadTile(
    typename Chosen::Sum* tile, const std::byte* from, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    tile[i] = Chosen::widen(valueAt<typename Chosen::Stored>(from, i));
  }
}

template <class Chosen, class Operation>
[[gnu::noinline]] void addToTile(
    typename Chosen::Sum* tile, const std::byte* from, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    const auto next = valueAt<typename Chosen::Stored>(from, i);
    tile[i] = Operation::of(tile[i], Chosen::widen(next));
  }
}

template <class Value>
[[gnu::noinline]] void divideTile(Value* tile, uint32_t divisor, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    tile[i] /= static_cast<Value>(divisor);
  }
}

template <class Chosen>
[[gnu::noinline]] void storeTile(
    std::byte* to, const typename Chosen::Sum* tile, size_t size) {
  for (size_t i = 0; i < size; ++i) {
    setValue(to, i, Chosen::round(tile[i]));
  }
}

/// All inputs of a tile are read before it is written: `to` may be an input.
template <class Chosen, class Operation>
void reduceTiles(const Arguments& all, uint32_t divisor) {
  using Value = typename Chosen::Sum;
  constexpr size_t kStored = sizeof(typename Chosen::Stored);
  constexpr size_t kStep = kTileBytes / sizeof(Value) * kStored;
  Value tile[kTileBytes / sizeof(Value)];
  for (size_t at = 0; at < all.bytes; at += kStep) {
    const size_t size = std::min(kStep, all.bytes - at) / kStored;
    loadTile<Chosen>(tile, all.inputs[0] + at, size);
    for (const std::byte* input : all.inputs.subspan(1)) {
      addToTile<Chosen, Operation>(tile, input + at, size);
    }
    if constexpr (std::is_floating_point_v<Value>) {
      if (divisor != 1) {
        divideTile(tile, divisor, size);
      }
    }
    storeTile<Chosen>(all.to + at, tile, size);
  }
}

template <class Chosen, class Operation>
void reduceWith(const Arguments& all, uint32_t divisor) {
  if (all.inputs.size() == 2 && divisor == 1) {
    reducePair<Chosen, Operation>(all);
  } else {
    reduceTiles<Chosen, Operation>(all, divisor);
  }
}

/// Of integers: their sums wrap around first, whatever their sign means.
template <class T>
void divideIntegers(std::byte* to, size_t bytes, uint32_t divisor) {
  using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
  for (size_t i = 0; i < bytes / sizeof(T); ++i) {
    const Wide value = valueAt<T>(to, i);
    setValue(to, i, static_cast<T>(value / static_cast<Wide>(divisor)));
  }
}

/// The operations in which the sign of an integer plays no part.
template <class Chosen>
void reduceUnsigned(
    ReduceOperation operation, const Arguments& all, uint32_t divisor) {
  if (operation == ReduceOperation::kSum) {
    reduceWith<Chosen, Sum>(all, divisor);
  } else {
    reduceWith<Chosen, Product>(all, divisor);
  }
}

template <class Chosen>
void reduceOrdered(
    ReduceOperation operation, const Arguments& all, uint32_t divisor) {
  if (operation == ReduceOperation::kMin) {
    reduceWith<Chosen, Min>(all, divisor);
  } else {
    reduceWith<Chosen, Max>(all, divisor);
  }
}

bool isBitwise(ReduceOperation operation) {
  return operation == ReduceOperation::kBitAnd ||
         operation == ReduceOperation::kBitOr ||
         operation == ReduceOperation::kBitXor;
}

bool isOrdered(ReduceOperation operation) {
  return operation == ReduceOperation::kMin ||
         operation == ReduceOperation::kMax;
}

template <DType kDType>
void reduceFloats(
    ReduceOperation operation, const Arguments& all, uint32_t divisor) {
  if (isOrdered(operation)) {
    reduceOrdered<Format<kDType>>(operation, all, divisor);
  } else if (operation == ReduceOperation::kSum && divisor == 1) {
    // The same sum, with the vectors of this processor.
    const auto end = static_cast<uint32_t>(all.inputs.size());
    const size_t elements = all.bytes / elementBytes(kDType);
    reduceRow(kDType, all.to, all.inputs, nullptr, {&end, 1}, elements);
  } else {
    reduceUnsigned<Format<kDType>>(operation, all, divisor);
  }
}

template <class T>
void reduceIntegers(
    ReduceOperation operation, const Arguments& all, uint32_t divisor) {
  if (isOrdered(operation)) {
    reduceOrdered<IntegerFormat<T>>(operation, all, 1);
  } else {
    reduceUnsigned<IntegerFormat<std::make_unsigned_t<T>>>(operation, all, 1);
  }
  if (divisor != 1) {
    divideIntegers<T>(all.to, all.bytes, divisor);
  }
}

/// Chosen: bool, or bytes of integers of any size.
template <class Chosen>
void reduceBits(ReduceOperation operation, const Arguments& all) {
  switch (operation) {
    case ReduceOperation::kBitAnd:
      return reduceWith<Chosen, BitAnd>(all, 1);
    case ReduceOperation::kBitOr:
      return reduceWith<Chosen, BitOr>(all, 1);
    default:
      return reduceWith<Chosen, BitXor>(all, 1);
  }
}

void reduceBools(ReduceOperation operation, const Arguments& all) {
  switch (operation) {
    case ReduceOperation::kSum:
    case ReduceOperation::kMax:
      return reduceBits<BoolFormat>(ReduceOperation::kBitOr, all);
    case ReduceOperation::kProduct:
    case ReduceOperation::kMin:
      return reduceBits<BoolFormat>(ReduceOperation::kBitAnd, all);
    default:
      return reduceBits<BoolFormat>(operation, all);
  }
}

}  // namespace

size_t elementBytes(ElementType type) {
  return kTypes[static_cast<size_t>(type)].bytes;
}

const char* nameOf(ElementType type) {
  return kTypes[static_cast<size_t>(type)].name;
}

const char* nameOf(ReduceOperation operation) {
  return kOperationNames[static_cast<size_t>(operation)];
}

bool supports(ElementType type, ReduceOperation operation) {
  return type < ElementType::kFloat16 || !isBitwise(operation);
}

void reduceElements(
    const Reduction& reduction,
    std::byte* to,
    std::span<const std::byte* const> inputs,
    size_t bytes,
    bool last) {
  const Arguments all{to, inputs, bytes};
  const ReduceOperation operation = reduction.operation;
  const uint32_t divisor = last ? reduction.divisor : 1;
  const bool isBool = reduction.type == ElementType::kBool;
  if (bytes == 0) {
    return;  // memory may be null
  }
  if (inputs.size() == 1 && divisor == 1 && !isBool) {
    std::memmove(to, inputs[0], bytes);
    return;
  }
  if (isBitwise(operation) && !isBool) {
    return reduceBits<IntegerFormat<uint8_t>>(operation, all);
  }
  switch (reduction.type) {
    case ElementType::kBool:
      return reduceBools(operation, all);
    case ElementType::kInt8:
      return reduceIntegers<int8_t>(operation, all, divisor);
    case ElementType::kUInt8:
      return reduceIntegers<uint8_t>(operation, all, divisor);
    case ElementType::kInt16:
      return reduceIntegers<int16_t>(operation, all, divisor);
    case ElementType::kUInt16:
      return reduceIntegers<uint16_t>(operation, all, divisor);
    case ElementType::kInt32:
      return reduceIntegers<int32_t>(operation, all, divisor);
    case ElementType::kUInt32:
      return reduceIntegers<uint32_t>(operation, all, divisor);
    case ElementType::kInt64:
      return reduceIntegers<int64_t>(operation, all, divisor);
    case ElementType::kUInt64:
      return reduceIntegers<uint64_t>(operation, all, divisor);
    case ElementType::kFloat16:
      return reduceFloats<DType::kFloat16>(operation, all, divisor);
    case ElementType::kBFloat16:
      return reduceFloats<DType::kBFloat16>(operation, all, divisor);
    case ElementType::kFloat32:
      return reduceFloats<DType::kFloat32>(operation, all, divisor);
    case ElementType::kFloat64:
      return reduceFloats<DType::kFloat64>(operation, all, divisor);
  }
}

}  // namespace automoe::kernels
