// SPDX-License-Identifier: Apache-2.0
// Kernels on a CUDA library without a GPU: those of ours are run by their
// emulation, which is found by the kernel's name; others are refused.
#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "cuda/emulated_cuda.hpp"
#include "cuda_library/streams.hpp"

namespace automoe::cuda_library {
namespace {

std::string readable(const char* mangled) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(
      abi::__cxa_demangle(mangled, nullptr, nullptr, &status), std::free);
  return status == 0 ? text.get() : mangled;
}

/// What both compilers call a kernel alike: its name and template arguments.
std::string shortName(std::string text) {
  for (const std::string part :
       {"(anonymous namespace)::", "automoe::kernels::", "void "}) {
    for (size_t at = 0; (at = text.find(part)) != std::string::npos;) {
      text.erase(at, part.size());
    }
  }
  return text.ends_with(')') ? text.substr(0, text.rfind('(')) : text;
}

/// Of the type Kernel<&name>, or Kernel<&(what a template makes)>.
std::string shortNameOf(const emulated::KnownKernel& kernel) {
  std::string text = readable(kernel.name);
  text = text.substr(text.find('&') + 1);
  text.pop_back();
  if (text.front() == '(' && !text.starts_with("(anonymous")) {
    text = text.substr(1, text.size() - 2);
  }
  return shortName(text);
}

struct Stubs {
  std::mutex mutex;
  std::map<const void*, std::string> names;  // by their stubs
};

Stubs& stubs() {
  static auto* const all = new Stubs;
  return *all;
}

const emulated::KnownKernel* find(const void* stub) {
  std::string name;
  {
    const std::lock_guard lock(stubs().mutex);
    const auto found = stubs().names.find(stub);
    if (found == stubs().names.end()) {
      return nullptr;
    }
    name = found->second;
  }
  static const auto* const all = [] {
    auto* made = new std::map<std::string, const emulated::KnownKernel*>;
    for (const auto& kernel : emulated::knownKernels()) {
      (*made)[shortNameOf(kernel)] = &kernel;
    }
    return made;
  }();
  const auto found = all->find(shortName(readable(name.c_str())));
  if (found == all->end()) {
    std::fprintf(
        stderr,
        "[cuda library] no emulation of %s\n",
        readable(name.c_str()).c_str());
    return nullptr;
  }
  return found->second;
}

}  // namespace
}  // namespace automoe::cuda_library

namespace emulated = automoe::emulated;
using namespace automoe::cuda_library;

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterVar(
    void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(
    void**,
    const char* stub,
    char*,
    const char* name,
    int,
    void*,
    void*,
    void*,
    void*,
    int*) {
  const std::lock_guard lock(stubs().mutex);
  stubs().names[stub] = name;
}

cudaError_t cudaFuncGetAttributes(
    struct cudaFuncAttributes* attributes, const void* stub) {
  *attributes = {};
  return find(stub) == nullptr ? refused(cudaErrorInvalidDeviceFunction)
                               : deviceError();
}

cudaError_t cudaLaunchKernel(
    const void* stub,
    dim3 blocks,
    dim3 threads,
    void** arguments,
    size_t sharedBytes,
    cudaStream_t stream) {
  const emulated::KnownKernel* kernel = find(stub);
  if (kernel == nullptr) {
    return refused(cudaErrorInvalidDeviceFunction);
  }
  const auto* call = static_cast<const std::byte*>(arguments[0]);
  const std::shared_ptr<std::byte[]> kept(
      new (std::align_val_t{64}) std::byte[kernel->callBytes],
      [](std::byte* it) { operator delete[](it, std::align_val_t{64}); });
  std::copy_n(call, kernel->callBytes, kept.get());
  streamOf(stream).enqueue([=] {
    emulated::run(kernel->name, blocks.x, threads.x, sharedBytes, [&] {
      kernel->invoke(kept.get());
    });
    return true;
  });
  return deviceError();
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel,
    dim3 blocks,
    dim3 threads,
    void** arguments,
    size_t sharedBytes,
    cudaStream_t stream) {
  return cudaLaunchKernel(
      reinterpret_cast<const void*>(kernel),
      blocks,
      threads,
      arguments,
      sharedBytes,
      stream);
}
}
