// SPDX-License-Identifier: Apache-2.0
// What torch links of the driver, so that it can load its part that does. The
// types are not the driver's: its header gives some names another spelling.
#include "cuda_library/streams.hpp"

namespace {

using Pointer = void*;

template <class... Arguments>
int call(const char* name, Arguments... arguments) {
  const auto function = automoe::cuda_library::driverFunction(name);
  return reinterpret_cast<int (*)(Arguments...)>(function)(arguments...);
}

}  // namespace

extern "C" {

int cuCtxGetCurrent(Pointer context) {
  return call("cuCtxGetCurrent", context);
}
int cuDeviceGet(Pointer device, int ordinal) {
  return call("cuDeviceGet", device, ordinal);
}
int cuDevicePrimaryCtxGetState(int device, Pointer flags, Pointer active) {
  return call("cuDevicePrimaryCtxGetState", device, flags, active);
}
int cuDevicePrimaryCtxRetain(Pointer context, int device) {
  return call("cuDevicePrimaryCtxRetain", context, device);
}
int cuGetErrorString(int error, Pointer text) {
  return call("cuGetErrorString", error, text);
}

#define AUTOMOE_REFUSED(name) \
  int name() {                \
    return call(#name);       \
  }
AUTOMOE_REFUSED(cuCtxSetCurrent)
AUTOMOE_REFUSED(cuDeviceGetAttribute)
AUTOMOE_REFUSED(cuFuncGetAttribute)
AUTOMOE_REFUSED(cuFuncSetAttribute)
AUTOMOE_REFUSED(cuFuncSetCacheConfig)
AUTOMOE_REFUSED(cuLaunchCooperativeKernel)
AUTOMOE_REFUSED(cuLaunchKernel)
AUTOMOE_REFUSED(cuLinkAddData_v2)
AUTOMOE_REFUSED(cuLinkComplete)
AUTOMOE_REFUSED(cuLinkCreate_v2)
AUTOMOE_REFUSED(cuModuleGetFunction)
AUTOMOE_REFUSED(cuModuleLoad)
AUTOMOE_REFUSED(cuModuleLoadData)
AUTOMOE_REFUSED(cuModuleLoadDataEx)
AUTOMOE_REFUSED(cuModuleUnload)
AUTOMOE_REFUSED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
AUTOMOE_REFUSED(cuPointerGetAttribute)
AUTOMOE_REFUSED(cuTensorMapEncodeTiled)
}
