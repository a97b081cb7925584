// SPDX-License-Identifier: Apache-2.0
// What torch links of NCCL, and the tests do not use.

extern "C" {

#define AUTOMOE_REFUSED(name)        \
  int name() {                       \
    return 5; /* ncclInvalidUsage */ \
  }
AUTOMOE_REFUSED(ncclCommDeregister)
AUTOMOE_REFUSED(ncclCommGetUniqueId)
AUTOMOE_REFUSED(ncclCommGrow)
AUTOMOE_REFUSED(ncclCommInitAll)
AUTOMOE_REFUSED(ncclCommInitRankScalable)
AUTOMOE_REFUSED(ncclCommMemStats)
AUTOMOE_REFUSED(ncclCommRegister)
AUTOMOE_REFUSED(ncclCommResume)
AUTOMOE_REFUSED(ncclCommRevoke)
AUTOMOE_REFUSED(ncclCommShrink)
AUTOMOE_REFUSED(ncclCommSplit)
AUTOMOE_REFUSED(ncclCommSuspend)
AUTOMOE_REFUSED(ncclCommWindowDeregister)
AUTOMOE_REFUSED(ncclCommWindowRegister)
AUTOMOE_REFUSED(ncclDevCommCreate)
AUTOMOE_REFUSED(ncclDevCommDestroy)
AUTOMOE_REFUSED(ncclGather)
AUTOMOE_REFUSED(ncclGetLsaMultimemDevicePointer)
AUTOMOE_REFUSED(ncclGetPeerDevicePointer)
AUTOMOE_REFUSED(ncclGroupSimulateEnd)
AUTOMOE_REFUSED(ncclMemAlloc)
AUTOMOE_REFUSED(ncclMemFree)
AUTOMOE_REFUSED(ncclPutSignal)
AUTOMOE_REFUSED(ncclRedOpCreatePreMulSum)
AUTOMOE_REFUSED(ncclRedOpDestroy)
AUTOMOE_REFUSED(ncclSignal)
AUTOMOE_REFUSED(ncclWaitSignal)
AUTOMOE_REFUSED(ncclWinGetUserPtr)
}
