// SPDX-License-Identifier: Apache-2.0
// A function with a stack of its own, which can stop halfway and go on later.
#pragma once

#include <cstddef>

namespace automoe::emulated {

/// Belongs to one thread of the system. The stack is kept from run to run.
class Fiber {
 public:
  /// What CUDA threads of these kernels need, with sanitizers.
  static constexpr size_t kStackBytes = size_t{64} << 10;

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  /// Sets what resume() begins with. A run that has not ended is forgotten: no
  /// destructor of it runs.
  void prepare(void (*function)(void*), void* argument);
  /// Runs until the function calls suspend() or ends, which gives true. Throws
  /// std::runtime_error when the stack was too small.
  bool resume();
  /// Called by the function: back to resume().
  void suspend();

 private:
  struct State;

  static void main();
  void makeFrame();
  void switchIn();
  void switchOut();

  State* state_;
};

}  // namespace automoe::emulated
