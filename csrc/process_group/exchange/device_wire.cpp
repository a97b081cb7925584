// SPDX-License-Identifier: Apache-2.0
#include "process_group/exchange/device_wire.hpp"

#include "kernels/row_math.hpp"

namespace automoe {

const char* nameOf(DeviceWire wire) {
  return wire == DeviceWire::kFp8 ? "as 8-bit floats" : "as they are";
}

uint64_t Fp8Format::scaleBytes() const {
  return kernels::scalesOf(elements) * sizeof(float);
}

std::optional<Fp8Format> fp8FormatOf(
    const DispatchArguments::Field& field, DeviceWire wire) {
  if (wire != DeviceWire::kFp8 || !field.number.has_value() ||
      *field.number == kernels::DType::kFloat64) {
    return std::nullopt;
  }
  const size_t bytes = kernels::elementBytes(*field.number);
  const Fp8Format format{*field.number, field.rowBytes / bytes};
  if (field.rowBytes % bytes != 0 ||
      format.valueBytes() + format.scaleBytes() >= field.rowBytes) {
    return std::nullopt;
  }
  return format;
}

}  // namespace automoe
