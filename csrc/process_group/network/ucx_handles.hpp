// SPDX-License-Identifier: Apache-2.0
// Owners of UCX's C handles and the check of its status codes.
#pragma once

#include <ucp/api/ucp.h>

#include <memory>

#include "process_group/common/error.hpp"

namespace automoe {

struct UcxContextDeleter {
  void operator()(ucp_context_h context) const { ucp_cleanup(context); }
};
struct UcxWorkerDeleter {
  void operator()(ucp_worker_h worker) const { ucp_worker_destroy(worker); }
};
struct UcxConfigDeleter {
  void operator()(ucp_config_t* config) const { ucp_config_release(config); }
};

using UcxContext =
    std::unique_ptr<std::remove_pointer_t<ucp_context_h>, UcxContextDeleter>;
using UcxWorker =
    std::unique_ptr<std::remove_pointer_t<ucp_worker_h>, UcxWorkerDeleter>;
using UcxConfig = std::unique_ptr<ucp_config_t, UcxConfigDeleter>;

/// Throws TransportError unless `status` is UCS_OK.
inline void checkUcx(ucs_status_t status, const char* call) {
  if (status != UCS_OK) {
    throw TransportError(concat(call, ": ", ucs_status_string(status)));
  }
}

}  // namespace automoe
