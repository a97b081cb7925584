// SPDX-License-Identifier: Apache-2.0
// Which network interface the ranks of different nodes talk over.
#pragma once

#include <string>

#include "process_group/common/config.hpp"

namespace automoe {

struct Interface {
  std::string name;     // "eth0"
  std::string address;  // "10.0.0.3"
  std::string reason;   // why this one
};

/// The interface that AUTOMOE_INTERFACE names, else the one on the route to
/// MASTER_ADDR, else the first that is up and not loopback, else loopback.
/// Throws InvalidArgument when the named one is missing or has no address.
Interface chooseInterface(const Config& config);

}  // namespace automoe
