// SPDX-License-Identifier: Apache-2.0
// How fast this machine copies: what decides between the two ways to a mate.
#pragma once

#include <string>

namespace automoe {

/// GB/s of the two ways in which a block comes to a node-mate.
struct CopyRates {
  double staged = 0;  // two copies, through a chunk that stays in the cache
  double crossMemory = 0;  // one process_vm_readv; 0 where it is not allowed

  bool preferCrossMemory() const { return crossMemory > staged; }
  std::string describe() const;
};

/// Takes a few milliseconds. Reads memory of this process itself, so it does
/// not tell whether a mate may be read.
CopyRates measureCopyRates();

}  // namespace automoe
