// SPDX-License-Identifier: Apache-2.0
#include "cuda/fibers.hpp"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __x86_64__
// As swapcontext(), which makes a system call each time to keep the signals.
extern "C" void automoeSwitchStack(void** saved, void* to);
asm(R"(
.text
.type automoeSwitchStack, @function
automoeSwitchStack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size automoeSwitchStack, . - automoeSwitchStack
)");
#endif

namespace automoe::emulated {
namespace {

// At the far end of the stack; an overflow would write over it.
constexpr uint64_t kCanary = 0x5CA1AB1E0DDBA115U;

#ifdef __x86_64__
using Context = void*;  // the stack pointer; the registers lie on the stack

void switchContext(Context& saved, Context& to) {
  automoeSwitchStack(&saved, to);
}

Context makeContext(std::byte* stack, size_t bytes, void (*entry)()) {
  constexpr size_t kRegisters = 6;
  // The entry finds its stack pointer as after a call: 8 bytes below a
  // multiple of 16.
  auto* top = reinterpret_cast<uint64_t*>(stack + bytes) - 1;
  *top = 0;
  *--top = reinterpret_cast<uint64_t>(entry);
  for (size_t i = 0; i < kRegisters; ++i) {
    *--top = 0;
  }
  return top;
}
#else
using Context = ucontext_t;

void switchContext(Context& saved, Context& to) {
  swapcontext(&saved, &to);
}

Context makeContext(std::byte* stack, size_t bytes, void (*entry)()) {
  Context made;
  getcontext(&made);
  made.uc_stack.ss_sp = stack;
  made.uc_stack.ss_size = bytes;
  made.uc_link = nullptr;
  makecontext(&made, entry, 0);
  return made;
}
#endif

}  // namespace

struct Fiber::State {
  std::byte* stack = nullptr;
  Context own = {};
  Context caller = {};
  void (*function)(void*) = nullptr;
  void* argument = nullptr;
  bool ended = true;
  // For the sanitizers.
  void* fakeStack = nullptr;
  const void* callerStack = nullptr;
  size_t callerBytes = 0;
  void* tsanOwn = nullptr;
  void* tsanCaller = nullptr;
};

namespace {

// Which fiber begins: its first function has no argument.
thread_local Fiber* beginning = nullptr;

}  // namespace

Fiber::Fiber() : state_(new State) {
  void* stack = mmap(
      nullptr,
      kStackBytes,
      PROT_READ | PROT_WRITE,
      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1,
      0);
  if (stack == MAP_FAILED) {
    delete state_;
    throw std::bad_alloc();
  }
  state_->stack = static_cast<std::byte*>(stack);
  std::memcpy(state_->stack, &kCanary, sizeof(kCanary));
#ifdef __SANITIZE_THREAD__
  state_->tsanOwn = __tsan_create_fiber(0);
#endif
  makeFrame();
}

Fiber::~Fiber() {
#ifdef __SANITIZE_THREAD__
  __tsan_destroy_fiber(state_->tsanOwn);
#endif
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(state_->stack, kStackBytes);
#endif
  munmap(state_->stack, kStackBytes);
  delete state_;
}

void Fiber::makeFrame() {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(state_->stack, kStackBytes);
#endif
  state_->own = makeContext(state_->stack, kStackBytes, &Fiber::main);
  state_->fakeStack = nullptr;
}

void Fiber::prepare(void (*function)(void*), void* argument) {
  if (!state_->ended) {
    makeFrame();
  }
  state_->function = function;
  state_->argument = argument;
  state_->ended = false;
}

bool Fiber::resume() {
  beginning = this;
  switchIn();
  uint64_t canary;
  std::memcpy(&canary, state_->stack, sizeof(canary));
  if (canary != kCanary) {
    throw std::runtime_error("a fiber's stack is too small");
  }
  return state_->ended;
}

void Fiber::suspend() {
  switchOut();
}

void Fiber::main() {
  Fiber& self = *beginning;
  State& state = *self.state_;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(
      nullptr, &state.callerStack, &state.callerBytes);
#endif
  for (;;) {
    state.function(state.argument);
    state.ended = true;
    self.switchOut();
  }
}

void Fiber::switchIn() {
#ifdef __SANITIZE_THREAD__
  state_->tsanCaller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(state_->tsanOwn, 0);
#endif
#ifdef __SANITIZE_ADDRESS__
  void* fakeStack = nullptr;
  __sanitizer_start_switch_fiber(&fakeStack, state_->stack, kStackBytes);
#endif
  switchContext(state_->caller, state_->own);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fakeStack, nullptr, nullptr);
#endif
}

void Fiber::switchOut() {
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(state_->tsanCaller, 0);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(
      &state_->fakeStack, state_->callerStack, state_->callerBytes);
#endif
  switchContext(state_->own, state_->caller);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(
      state_->fakeStack, &state_->callerStack, &state_->callerBytes);
#endif
}

}  // namespace automoe::emulated
