// SPDX-License-Identifier: Apache-2.0
// A library that may lack: opened at run time, never linked.
#pragma once

#include <dlfcn.h>

#include <string>

namespace automoe {

/// Stays open until the process ends: what it has started may run that long.
class SharedLibrary {
 public:
  /// The copy that is loaded already (torch's), else the one that the loader
  /// finds.
  explicit SharedLibrary(const std::string& file) {
    handle_ = dlopen(file.c_str(), RTLD_NOLOAD | RTLD_NOW);
    if (handle_ == nullptr) {
      handle_ = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    }
    if (handle_ == nullptr) {
      const char* text = dlerror();
      failure_ = text == nullptr ? file + " cannot be opened" : text;
    }
  }

  /// Sets `function`, or notes that the library lacks it.
  template <typename Function>
  void find(const char* name, Function*& function) {
    void* symbol = handle_ == nullptr ? nullptr : dlsym(handle_, name);
    function = reinterpret_cast<Function*>(symbol);
    if (symbol == nullptr && failure_.empty()) {
      failure_ = std::string("it has no ") + name;
    }
  }
  /// As find(), for what older versions lack: then `function` is null.
  template <typename Function>
  void findOptional(const char* name, Function*& function) {
    function = handle_ == nullptr
                   ? nullptr
                   : reinterpret_cast<Function*>(dlsym(handle_, name));
  }

  /// What lacks, or nothing.
  const std::string& failure() const { return failure_; }

 private:
  void* handle_ = nullptr;
  std::string failure_;
};

}  // namespace automoe
