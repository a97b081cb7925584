// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/fp8_columns.hpp"

namespace automoe {
namespace {

using Formats = std::vector<std::optional<Fp8Format>>;

Formats formatsOf(const DispatchArguments& arguments, const DeviceLane& lane) {
  Formats formats;
  for (const DispatchArguments::Field& field : arguments.fields) {
    formats.push_back(
        lane.network == nullptr ? std::nullopt : fp8FormatOf(field, lane.wire));
  }
  return formats;
}

std::vector<DeviceColumn> columnsOf(const Formats& formats) {
  std::vector<DeviceColumn> columns;
  for (const auto& format : formats) {
    columns.emplace_back().bytes = format ? format->valueBytes() : 0;
    columns.emplace_back().bytes = format ? format->scaleBytes() : 0;
  }
  return columns;
}

ColumnLayout layoutFor(const Formats& formats, size_t rows) {
  return {columnsOf(formats), std::vector<size_t>(2 * formats.size(), rows)};
}

float* asScales(std::byte* at) {
  return reinterpret_cast<float*>(at);
}

}  // namespace

Fp8Columns::Fp8Columns(
    const DeviceLane& lane,
    const DispatchArguments& arguments,
    size_t sendRows,
    size_t landRows)
    : lane_(lane),
      formats_(formatsOf(arguments, lane)),
      outgoing_(layoutFor(formats_, sendRows)),
      incoming_(layoutFor(formats_, landRows)) {}

void Fp8Columns::place(std::byte* outgoing, std::byte* incoming) {
  send_ = outgoing;
  land_ = incoming;
}

template <typename Call>
Call Fp8Columns::callFor(
    std::byte* memory,
    const ColumnLayout& layout,
    size_t column,
    size_t begin,
    size_t end) const {
  const Fp8Format& format = *formats_[column];
  std::byte* const values = memory + layout.offset(2 * column);
  std::byte* const scales = memory + layout.offset(2 * column + 1);
  Call call;
  call.dtype = format.dtype;
  call.values =
      reinterpret_cast<uint8_t*>(values + begin * format.valueBytes());
  call.scales = asScales(scales + begin * format.scaleBytes());
  call.count = end - begin;
  call.elements = format.elements;
  call.maxBlocks = lane_.maxBlocks;
  return call;
}

template <typename Call>
void Fp8Columns::run(const Call& call) const {
  if (call.count > 0) {
    lane_.device.run(lane_.stream, [call](kernels::DeviceStream stream) {
      kernels::enqueue(call, stream);
    });
  }
}

void Fp8Columns::quantize(
    size_t column,
    const std::byte* rows,
    const int32_t* index,
    size_t begin,
    size_t end) const {
  auto call =
      callFor<kernels::QuantizeRows>(send_, outgoing_, column, begin, end);
  if (index != nullptr) {
    call.rows = rows;
    call.index = index + begin;
  } else {
    call.rows = rows + begin * formats_[column]->rowBytes();
  }
  run(call);
}

void Fp8Columns::dequantize(
    size_t column, std::byte* rows, size_t begin, size_t end) const {
  auto call =
      callFor<kernels::DequantizeRows>(land_, incoming_, column, begin, end);
  call.rows = rows + begin * formats_[column]->rowBytes();
  run(call);
}

std::array<DeviceColumn, 2> Fp8Columns::carried(size_t column) const {
  const auto part = [&](size_t which, uint64_t bytes) -> DeviceColumn {
    return {
        send_ + outgoing_.offset(which),
        land_ + incoming_.offset(which),
        bytes,
        false};
  };
  const Fp8Format& format = *formats_[column];
  return {
      part(2 * column, format.valueBytes()),
      part(2 * column + 1, format.scaleBytes())};
}

}  // namespace automoe
