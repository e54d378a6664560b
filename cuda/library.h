// A library of NVIDIA's that is loaded when it is asked for, and not before: the module itself links none.
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <string>

namespace moebius::cuda {

// One of each is made and never ended: a rank's thread may still call it when the process exits.
class Library {
 public:
  // The file that the environment variable names, else `file` as the loader finds it (what the process has already, if any).
  Library(const char* variable, const std::string& file) {
#ifndef MOEBIUS_EMULATED
    const char* named = std::getenv(variable);
    file_ = named != nullptr && *named != '\0' ? named : file;
    handle_ = dlopen(file_.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (handle_ == nullptr) failure_ = std::string(dlerror()) + " (" + variable + " names the file)";
#else
    (void)variable, (void)file;
#endif
  }
  const std::string& failure() const { return failure_; }  // why it, or a function of it, could not be loaded

 protected:
  template <class Function>
  Function find(const char* name) {
    void* function = handle_ != nullptr ? dlsym(handle_, name) : nullptr;
    if (function == nullptr && failure_.empty()) failure_ = file_ + " has no " + name;
    return reinterpret_cast<Function>(function);
  }

 private:
  void* handle_ = nullptr;
  std::string file_, failure_;
};

// A member of such a library's class: the function of this name. (What stands in for the library in tests is linked.)
#ifdef MOEBIUS_EMULATED
#define MOEBIUS_LIBRARY_FUNCTION(member, function) decltype(&function) member = &function
#else
#define MOEBIUS_LIBRARY_FUNCTION(member, function) decltype(&function) member = find<decltype(&function)>(#function)
#endif

}  // namespace moebius::cuda
