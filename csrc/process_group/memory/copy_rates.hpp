// SPDX-License-Identifier: Apache-2.0
// How fast this machine copies: what decides between the two ways to a mate.
#pragma once

#include <string>

namespace automoe {

/// Bytes per nanosecond (GB/s), of blocks of the size of one staged chunk.
struct CopyRates {
  double inCache = 0;      // memcpy between buffers that are in the cache
  double crossMemory = 0;  // process_vm_readv; 0 where it is not allowed

  /// A block comes to a mate by one cross-memory read, or by two copies
  /// through a chunk of node memory that stays in the cache.
  bool preferCrossMemory() const { return crossMemory > inCache / 2; }
  std::string describe() const;
};

/// Takes well under a millisecond. Reads memory of this process itself, so it
/// does not tell whether a mate may be read.
CopyRates measureCopyRates();

}  // namespace automoe
