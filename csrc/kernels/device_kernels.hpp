// SPDX-License-Identifier: Apache-2.0
// The kernels on a device: the twins of rows.hpp and reduce.hpp, to the same
// bits. Each call enqueues on a stream and returns; memory is the device's and
// must stay until the stream has passed the call. Lists of numbers are aligned
// to their type; rows, weights and 8-bit values lie at any address. Without
// rows a call does nothing, but counts and ends are written even without ids.
// Throws std::runtime_error when CUDA refuses a launch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/dtype.hpp"

namespace automoe::kernels {

/// A cudaStream_t, without CUDA's headers.
using DeviceStream = void*;

/// Has all kernels on the current device now: CUDA loads each when it is first
/// launched, for which it may wait for the device, and so for other ranks.
/// Throws std::runtime_error when CUDA cannot.
void loadKernels();

/// Arrays that an index can point into; passed to a kernel by value.
struct RowBases {
  /// The GPUs of the largest node (72), and what a caller has beside them.
  static constexpr size_t kMost = 80;

  const std::byte* at[kMost] = {};
};

/// Row i of `to` = row index[i] of from.at[base[i]]; zeros where index[i] is
/// negative (base[i] does not matter there). Rows lie at any address; where all
/// are aligned to 16 bytes, they are moved in vectors.
struct GatherRows {
  std::byte* to = nullptr;
  size_t count = 0;
  size_t rowBytes = 0;
  const int32_t* base = nullptr;   // (count,); null: 0
  const int32_t* index = nullptr;  // (count,); null: i
  RowBases from = {};
  int maxBlocks = 0;  // 0: as many as are good
};
void enqueue(const GatherRows& call, DeviceStream stream);

/// Row i of `to` = the sum over its segments, in order, of
///     round(sum over the segment's terms, in order, of weight * row)
/// as kernels::reduceRow does it, whose rules hold to the bit. The segments of
/// row i are [segmentBegin[i], segmentBegin[i + 1]), the terms of segment s
/// [termBegin[s], termEnd[s]). Term t is row index[t] of rows.at[base[t]], its
/// weight value index[t] of weights.at[base[t]], in the type of the sum; where
/// index[t] is negative, both are zero.
struct ReduceRows {
  DType dtype = DType::kFloat32;
  std::byte* to = nullptr;
  size_t count = 0;
  size_t elements = 0;                    // of a row
  const int32_t* segmentBegin = nullptr;  // (count + 1,); null: one each
  const int32_t* termBegin = nullptr;     // (segments + 1,)
  /// (segments,); null: termBegin + 1. Only with one segment for each row, and
  /// then termBegin has no last word.
  const int32_t* termEnd = nullptr;
  const int32_t* base = nullptr;   // (terms,); null: 0
  const int32_t* index = nullptr;  // (terms,)
  RowBases rows = {};
  bool weighted = false;  // else every weight is 1
  RowBases weights = {};
  int maxBlocks = 0;  // 0: as many as are good
};
/// Throws std::invalid_argument for termEnd together with segmentBegin.
void enqueue(const ReduceRows& call, DeviceStream stream);

/// counts[e] = how many of the ids are e, for e below `experts`; other ids are
/// left out.
struct CountIds {
  const int32_t* ids = nullptr;  // (count,)
  size_t count = 0;
  int32_t* counts = nullptr;  // (experts,)
  size_t experts = 0;
};
void enqueue(const CountIds& call, DeviceStream stream);

/// The lists of a permutation by experts, as permute makes them on the CPU. A
/// slot is a place in `ids`; ids outside [0, experts) have no row. The rows of
/// an expert follow those of the one before, by ascending slot, and are padded
/// to a multiple of `align`.
struct SortSlots {
  const int32_t* ids = nullptr;  // (count,)
  size_t count = 0;
  size_t experts = 0;
  size_t align = 1;
  int32_t* counts = nullptr;  // (experts,): slots of each expert
  int32_t* ends = nullptr;    // (experts,): the end of its rows
  int32_t* index = nullptr;   // (rows,): the slot of each row, -1 for padding
  size_t rows = 0;            // rows beyond are left out
  void* scratch = nullptr;    // scratchBytes(call) bytes, as cudaMalloc aligns
};
/// Throws std::invalid_argument when there can be more than 2^31 - 1 rows.
void enqueue(const SortSlots& call, DeviceStream stream);
size_t scratchBytes(const SortSlots& call);

/// scaled[i] = round(weights[i] * grads[i]), without weights grads[i] as it is;
/// dots[i] = the sum of grads[i] * values[i], as scaleAndDotRows does both.
/// Both are zero where index[i] is negative.
struct ScaleAndDot {
  DType dtype = DType::kFloat32;
  std::byte* scaled = nullptr;  // null: not wanted; may be grads
  void* dots = nullptr;         // (count,) of the sum's type; null: not wanted
  const std::byte* grads = nullptr;
  const std::byte* values = nullptr;  // read only for dots
  const void* weights = nullptr;      // (count,) of the sum's type; null: none
  const int32_t* index = nullptr;     // (count,); null: none is negative
  size_t count = 0;
  size_t elements = 0;  // of a row
  int maxBlocks = 0;    // 0: as many as are good
};
void enqueue(const ScaleAndDot& call, DeviceStream stream);

/// same[i] = 1 where row first[i] of `a` and row second[i] of `b` hold the same
/// bytes, else 0. A negative index is a row that equals none.
struct SameRows {
  const std::byte* a = nullptr;
  const std::byte* b = nullptr;
  const int32_t* first = nullptr;   // (count,)
  const int32_t* second = nullptr;  // (count,)
  size_t count = 0;
  size_t rowBytes = 0;
  uint8_t* same = nullptr;  // (count,)
  int maxBlocks = 0;        // 0: as many as are good
};
void enqueue(const SameRows& call, DeviceStream stream);

/// probes[i] = probeRow(row i).
struct ProbeRows {
  const std::byte* rows = nullptr;
  size_t count = 0;
  size_t rowBytes = 0;
  uint64_t* probes = nullptr;  // (count,)
  int maxBlocks = 0;           // 0: as many as are good
};
void enqueue(const ProbeRows& call, DeviceStream stream);

/// Rows as 8-bit floats with scales and back, as quantizeRow and dequantizeRow
/// (quantize.hpp) do it for each row. Values and scales of all rows lie one
/// after the other. Throws std::invalid_argument for float64.
///
/// Quantized row i is row index[i] of `rows`; a row of zeros where index[i] is
/// negative.
struct QuantizeRows {
  DType dtype = DType::kBFloat16;
  const std::byte* rows = nullptr;
  const int32_t* index = nullptr;  // (count,); null: i
  uint8_t* values = nullptr;       // (count, elements)
  float* scales = nullptr;         // (count, scalesOf(elements))
  size_t count = 0;
  size_t elements = 0;  // of a row
  int maxBlocks = 0;    // 0: as many as are good
};
void enqueue(const QuantizeRows& call, DeviceStream stream);

struct DequantizeRows {
  DType dtype = DType::kBFloat16;
  std::byte* rows = nullptr;
  const uint8_t* values = nullptr;  // (count, elements)
  const float* scales = nullptr;    // (count, scalesOf(elements))
  size_t count = 0;
  size_t elements = 0;  // of a row
  int maxBlocks = 0;    // 0: as many as are good
};
void enqueue(const DequantizeRows& call, DeviceStream stream);

}  // namespace automoe::kernels
