// SPDX-License-Identifier: Apache-2.0
// QuantizeRows and DequantizeRows: half a warp for each block of 128 elements,
// 8 neighbouring elements a thread.
#include <bit>

#include "kernels/pieces.cuh"
#include "kernels/quantize.hpp"

namespace automoe::kernels {
namespace {

constexpr unsigned kAllLanes = ~0U;
constexpr size_t kPerThread = 8;
constexpr unsigned kTeamThreads = kScaleElements / kPerThread;
constexpr unsigned kTeamShift = std::countr_zero(kTeamThreads);

template <class Rows>
struct Blocks {
  Rows rows;
  size_t perRow;
};

/// The 8 elements of a thread.
template <DType kDType, size_t kUnit>
struct Eight {
  using Stored = typename Format<kDType>::Stored;
  static constexpr size_t kPieces = kPerThread * sizeof(Stored) / kPieceBytes;
  // Of the 8-bit values: as wide as the rows' unit for as many elements.
  static constexpr size_t kValueUnit = kUnit > sizeof(Stored)
                                           ? kUnit / sizeof(Stored)
                                           : 1;

  Stored at[kPerThread];

  // Not as what is read once: a row is quantized for each node that it goes to.
  __device__ __forceinline__ void loadFrom(const std::byte* row, size_t bytes) {
#pragma unroll
    for (size_t i = 0; i < kPieces; ++i) {
      const auto piece = loadPiece<kUnit, false>(
          row + i * kPieceBytes, bytesAt(i * kPieceBytes, bytes));
      memcpy(at + i * (kPerThread / kPieces), &piece, kPieceBytes);
    }
  }
  __device__ __forceinline__ void storeTo(std::byte* row, size_t bytes) const {
#pragma unroll
    for (size_t i = 0; i < kPieces; ++i) {
      PieceOf<kUnit> piece;
      memcpy(&piece, at + i * (kPerThread / kPieces), kPieceBytes);
      storePiece(row + i * kPieceBytes, piece, bytesAt(i * kPieceBytes, bytes));
    }
  }
};

/// The 8-bit values of a thread.
template <size_t kUnit>
union EightValues {
  static constexpr size_t kUnits = kPerThread / kUnit;

  typename UnitOf<kUnit>::Type units[kUnits];
  uint8_t at[kPerThread];
};

/// Which elements a thread has.
struct Place {
  size_t row;
  size_t block;  // of the row
  size_t begin;  // its first element of the row
  size_t size;   // its elements: 8 or fewer
};

__device__ __forceinline__ Place placeOf(
    size_t item, size_t count, size_t perRow, size_t elements, unsigned rank) {
  Place place{};
  if (item < count * perRow) {
    place.row = item / perRow;
    place.block = item - place.row * perRow;
    place.begin = place.block * kScaleElements + rank * kPerThread;
    const size_t left = bytesAt(place.begin, elements);
    place.size = left < kPerThread ? left : kPerThread;
  }
  return place;
}

/// The elements of a place in the row that an index has for it; zeros where it
/// has none.
template <class Of>
__device__ __forceinline__ Of
elementsOf(const QuantizeRows& rows, const Place& place) {
  constexpr size_t kBytes = sizeof(typename Of::Stored);
  const int64_t from = rows.index == nullptr ? static_cast<int64_t>(place.row)
                                             : rows.index[place.row];
  const bool isRow = from >= 0;
  const size_t row = isRow ? static_cast<size_t>(from) : 0;
  Of elements;
  elements.loadFrom(
      rows.rows + (row * rows.elements + place.begin) * kBytes,
      isRow ? place.size * kBytes : 0);
  return elements;
}

template <DType kDType, size_t kUnit>
__global__ void __launch_bounds__(1024)
    quantizeRows(const __grid_constant__ Blocks<QuantizeRows> call) {
  using Of = Eight<kDType, kUnit>;
  constexpr size_t kValueUnit = Of::kValueUnit;
  const QuantizeRows& rows = call.rows;
  const Team team = teamOf(kTeamShift);
  const size_t teamOfWarp = threadIdx.x % 32 / kTeamThreads;
  for (size_t first = team.item - teamOfWarp; first < rows.count * call.perRow;
       first += team.step) {
    const Place place = placeOf(
        first + teamOfWarp, rows.count, call.perRow, rows.elements, team.rank);
    const Of elements = elementsOf<Of>(rows, place);
    float largest = 0;
#pragma unroll
    for (size_t i = 0; i < kPerThread; ++i) {
      largest = largerFinite(largest, Format<kDType>::widen(elements.at[i]));
    }
#pragma unroll
    for (unsigned step = kTeamThreads / 2; step > 0; step /= 2) {
      const float other =
          __shfl_xor_sync(kAllLanes, largest, static_cast<int>(step));
      largest = other > largest ? other : largest;
    }
    const float scale = scaleFor(largest);
    const float inverse = 1.0F / scale;
    EightValues<kValueUnit> values;
#pragma unroll
    for (size_t i = 0; i < kPerThread; ++i) {
      values.at[i] = floatToFloat8E4M3(
          multiply(Format<kDType>::widen(elements.at[i]), inverse));
    }
    auto* const to = reinterpret_cast<std::byte*>(rows.values) +
                     place.row * rows.elements + place.begin;
#pragma unroll
    for (size_t i = 0; i < EightValues<kValueUnit>::kUnits; ++i) {
      if (i * kValueUnit < place.size) {
        storeOnce(to + i * kValueUnit, values.units[i]);
      }
    }
    if (team.rank == 0 && place.size > 0) {
      rows.scales[place.row * call.perRow + place.block] = scale;
    }
  }
}

template <DType kDType, size_t kUnit>
__global__ void __launch_bounds__(1024)
    dequantizeRows(const __grid_constant__ Blocks<DequantizeRows> call) {
  using Of = Eight<kDType, kUnit>;
  constexpr size_t kValueUnit = Of::kValueUnit;
  constexpr size_t kBytes = sizeof(typename Of::Stored);
  const DequantizeRows& rows = call.rows;
  const Team team = teamOf(kTeamShift);
  for (size_t item = team.item; item < rows.count * call.perRow;
       item += team.step) {
    const Place place =
        placeOf(item, rows.count, call.perRow, rows.elements, team.rank);
    const size_t at = place.row * rows.elements + place.begin;
    const auto* const from =
        reinterpret_cast<const std::byte*>(rows.values) + at;
    EightValues<kValueUnit> values = {};
#pragma unroll
    for (size_t i = 0; i < EightValues<kValueUnit>::kUnits; ++i) {
      loadIf<true>(
          values.units[i], from + i * kValueUnit, i * kValueUnit < place.size);
    }
    const float scale = rows.scales[place.row * call.perRow + place.block];
    Of elements;
#pragma unroll
    for (size_t i = 0; i < kPerThread; ++i) {
      elements.at[i] = Format<kDType>::round(
          multiply(float8E4M3ToFloat(values.at[i]), scale));
    }
    elements.storeTo(rows.rows + at * kBytes, place.size * kBytes);
  }
}

/// The widest unit that fits the rows and, for as many elements, the values.
Alignment alignmentOf(
    const void* rows, const void* values, size_t elements, DType dtype) {
  const size_t bytes = elementBytes(dtype);
  Alignment alignment;
  alignment.add(rows);
  alignment.add(elements * bytes);
  alignment.add(reinterpret_cast<uintptr_t>(values) * bytes);
  return alignment;
}

template <class Rows>
LaunchShape shapeFor(const Blocks<Rows>& call) {
  const unsigned threads = blockThreadsFor(call.rows.maxBlocks);
  return {
      blocksFor(
          call.rows.count * call.perRow,
          threads / kTeamThreads,
          call.rows.maxBlocks),
      threads};
}

/// Calls call(dtype, unit) with the types that can be quantized.
template <class Call>
void withTypes(DType dtype, const Alignment& alignment, const Call& call) {
  withDType(dtype, [&](auto type) {
    if constexpr (decltype(type)::value != DType::kFloat64) {
      constexpr size_t kLeast = elementBytes(decltype(type)::value);
      alignment.withUnit<kLeast>([&](auto unit) { call(type, unit); });
    }
  });
}

}  // namespace

void enqueue(const QuantizeRows& rows, DeviceStream stream) {
  checkQuantizable(rows.dtype);
  if (rows.count == 0 || rows.elements == 0) {
    return;
  }
  const Blocks<QuantizeRows> call{rows, scalesOf(rows.elements)};
  withTypes(
      rows.dtype,
      alignmentOf(rows.rows, rows.values, rows.elements, rows.dtype),
      [&](auto type, auto unit) {
        launch(
            "quantizeRows",
            Kernel<
                quantizeRows<decltype(type)::value, decltype(unit)::value>>(),
            shapeFor(call),
            stream,
            call);
      });
}

void enqueue(const DequantizeRows& rows, DeviceStream stream) {
  checkQuantizable(rows.dtype);
  if (rows.count == 0 || rows.elements == 0) {
    return;
  }
  const Blocks<DequantizeRows> call{rows, scalesOf(rows.elements)};
  withTypes(
      rows.dtype,
      alignmentOf(rows.rows, rows.values, rows.elements, rows.dtype),
      [&](auto type, auto unit) {
        launch(
            "dequantizeRows",
            Kernel<
                dequantizeRows<decltype(type)::value, decltype(unit)::value>>(),
            shapeFor(call),
            stream,
            call);
      });
}

}  // namespace automoe::kernels
