// SPDX-License-Identifier: Apache-2.0
#include "process_group/device/nccl.hpp"

#include <cstring>

#include "process_group/device/shared_library.hpp"

namespace automoe {
namespace {

using Clock = std::chrono::steady_clock;
using Functions = NcclFunctions;

static_assert(sizeof(Functions::Config) == 40, "the layout of NCCL 2.17");
static_assert(sizeof(Functions::Id) == sizeof(NcclId));

// Calls settle within some tens of microseconds, unless a peer is late.
constexpr auto kSpin = std::chrono::microseconds(200);
constexpr auto kNap = std::chrono::microseconds(100);

std::string describe(
    const Functions& functions,
    const char* call,
    int result,
    Functions::Communicator communicator) {
  std::string text =
      concat(call, " failed: ", functions.getErrorString(result));
  const char* last = functions.getLastError(communicator);
  if (last != nullptr && *last != 0) {
    text += concat(" (", last, ")");
  }
  return text + "; NCCL_DEBUG=INFO has NCCL say more";
}

bool accepted(int result) {
  return result == Functions::kSuccess || result == Functions::kInProgress;
}

}  // namespace

NcclLibrary openNccl(const std::string& file) {
  NcclLibrary found;
  SharedLibrary library(file);
  Functions& functions = found.functions;
  library.find("ncclGetVersion", functions.getVersion);
  library.find("ncclGetUniqueId", functions.getUniqueId);
  library.find("ncclCommInitRankConfig", functions.commInitRankConfig);
  library.find("ncclCommGetAsyncError", functions.commGetAsyncError);
  library.find("ncclCommFinalize", functions.commFinalize);
  library.find("ncclCommDestroy", functions.commDestroy);
  library.find("ncclCommAbort", functions.commAbort);
  library.find("ncclGroupStart", functions.groupStart);
  library.find("ncclGroupEnd", functions.groupEnd);
  library.find("ncclSend", functions.send);
  library.find("ncclRecv", functions.receive);
  library.find("ncclGetErrorString", functions.getErrorString);
  library.find("ncclGetLastError", functions.getLastError);
  found.reason = library.failure();
  if (!found.reason.empty()) {
    found.reason =
        concat("NCCL >= 2.14 cannot be used as ", file, ": ", found.reason);
    return found;
  }
  if (functions.getVersion(&found.version) != Functions::kSuccess) {
    found.version = 0;
    found.reason = concat(file, " does not tell its version");
  }
  return found;
}

std::string ncclVersionText(int version) {
  return concat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

NcclId makeNcclId(const NcclFunctions& functions) {
  Functions::Id made;
  const int result = functions.getUniqueId(&made);
  if (result != Functions::kSuccess) {
    throw DeviceError(describe(functions, "ncclGetUniqueId", result, nullptr));
  }
  NcclId id;
  std::memcpy(id.data(), made.bytes.data(), id.size());
  return id;
}

NcclNetwork::NcclNetwork(
    const NcclFunctions& functions,
    const NcclId& id,
    Place place,
    const Terms& terms)
    : functions_(functions), place_(place), timeout_(terms.timeout) {
  Functions::Id ncclId;
  std::memcpy(ncclId.bytes.data(), id.data(), id.size());
  Functions::Config config;
  if (terms.maxCtas > 0) {
    config.size = sizeof(config);
    config.version = 21700;
    config.maxCtas = terms.maxCtas;
  }
  const int result = functions_.commInitRankConfig(
      &communicator_, place.size, ncclId, place.rank, &config);
  try {
    if (!accepted(result)) {
      fail("ncclCommInitRankConfig", result);
    }
    settle("ncclCommInitRankConfig", terms.givenUp);
  } catch (...) {
    if (communicator_ != nullptr) {
      functions_.commAbort(communicator_);
    }
    throw;
  }
}

NcclNetwork::~NcclNetwork() {
  if (aborting_.joinable()) {
    aborting_.join();
  }
  if (communicator_ == nullptr) {
    return;
  }
  if (inGraphs_) {
    end(communicator_);
  } else if (failure_.empty() && finalized()) {
    functions_.commDestroy(communicator_);
  } else {
    functions_.commAbort(communicator_);
  }
}

/// Aborts it on a thread of its own: NCCL waits until kernels on the device
/// have seen it, and until no graph has calls of the communicator. That may be
/// never, as the caller may be who has the graph, so nobody waits for it then.
void NcclNetwork::end(Functions::Communicator communicator) noexcept {
  try {
    aborting_ = std::thread(
        [abort = functions_.commAbort, communicator] { abort(communicator); });
    if (inGraphs_) {
      aborting_.detach();
    }
  } catch (const std::exception&) {
    functions_.commAbort(communicator);
  }
}

bool NcclNetwork::finalized() noexcept {
  try {
    if (!accepted(functions_.commFinalize(communicator_))) {
      return false;
    }
    settle("ncclCommFinalize");
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

void NcclNetwork::exchange(
    Device::Stream stream,
    std::span<const Send> sends,
    std::span<const Receive> receives) {
  const std::lock_guard oneAtATime(exchanging_);
  {
    const std::lock_guard lock(mutex_);
    requireHealthy();
    enqueue(stream, sends, receives);
  }
  settle("ncclGroupEnd");
}

void NcclNetwork::enqueue(
    Device::Stream stream,
    std::span<const Send> sends,
    std::span<const Receive> receives) {
  const char* call = "ncclGroupStart";
  int result = functions_.groupStart();
  if (!accepted(result)) {
    fail(call, result);
  }
  // A peer leaves out the counterpart of what has no bytes, as it sees none.
  for (const Send& send : sends) {
    if (send.bytes > 0 && accepted(result)) {
      call = "ncclSend";
      result = functions_.send(
          send.data,
          send.bytes,
          Functions::kInt8,
          send.peer,
          communicator_,
          stream);
    }
  }
  for (const Receive& receive : receives) {
    if (receive.bytes > 0 && accepted(result)) {
      call = "ncclRecv";
      result = functions_.receive(
          receive.data,
          receive.bytes,
          Functions::kInt8,
          receive.peer,
          communicator_,
          stream);
    }
  }
  // Also after a failure: the thread is in a group until then.
  const int end = functions_.groupEnd();
  if (!accepted(result)) {
    fail(call, result);
  }
  if (!accepted(end)) {
    fail("ncclGroupEnd", end);
  }
}

/// Waits until the last call has been carried out (work of streams may still
/// be under way), or `givenUp` says that it will not.
void NcclNetwork::settle(const char* call, const Asked& givenUp) {
  const auto begin = Clock::now();
  while (true) {
    {
      const std::lock_guard lock(mutex_);
      requireHealthy();
      int state = Functions::kSuccess;
      const int result = functions_.commGetAsyncError(communicator_, &state);
      if (result != Functions::kSuccess) {
        fail("ncclCommGetAsyncError", result);
      }
      if (state == Functions::kSuccess) {
        return;
      }
      if (state != Functions::kInProgress) {
        fail(call, state);
      }
      if (givenUp()) {
        failure_ = concat(call, " was given up, because another rank failed");
        throw DeviceError(failure_);
      }
      if (Clock::now() - begin > timeout_) {
        failure_ = concat(
            call,
            " of rank ",
            place_.rank,
            " waits for its peers for more than ",
            timeout_.count(),
            " ms; see whether all ",
            place_.size,
            " ranks make the same calls and can reach each other");
        throw DeviceError(failure_);
      }
    }
    if (Clock::now() - begin < kSpin) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kNap);
    }
  }
}

void NcclNetwork::requireHealthy() const {
  if (!failure_.empty()) {
    throw DeviceError(failure_);
  }
}

void NcclNetwork::fail(const char* call, int result) {
  failure_ = describe(functions_, call, result, communicator_);
  throw DeviceError(failure_);
}

void NcclNetwork::abort() noexcept {
  const std::lock_guard lock(mutex_);
  if (communicator_ == nullptr) {
    return;
  }
  if (failure_.empty()) {
    failure_ = concat(
        "the NCCL communicator of rank ",
        place_.rank,
        " of ",
        place_.size,
        " was aborted, because its group has failed");
  }
  end(std::exchange(communicator_, nullptr));
}

std::string NcclNetwork::failure() {
  const std::lock_guard lock(mutex_);
  if (!failure_.empty()) {
    return failure_;
  }
  int state = Functions::kSuccess;
  const int result = functions_.commGetAsyncError(communicator_, &state);
  if (!accepted(result)) {
    failure_ =
        describe(functions_, "ncclCommGetAsyncError", result, communicator_);
  } else if (!accepted(state)) {
    failure_ = describe(functions_, "an exchange", state, communicator_);
  }
  return failure_;
}

}  // namespace automoe
