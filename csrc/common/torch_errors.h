// What PyTorch says where a call into it fails, which as a rule is that no memory is left. Its
// stable ABI hands on an error code; the message has to be asked for, from torch 2.13 on.

#pragma once

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace dgl_ext {

// `op` with torch's own message for a failure within torch. Before torch 2.13 the message begins as
// torch's does for want of memory, by which training loops that look for a batch size know it.
template <auto op, bool on_cuda>
struct Guarded;
template <class Result, class... Arguments, Result (*op)(Arguments...), bool on_cuda>
struct Guarded<op, on_cuda> {
  static Result call(Arguments... arguments) {
    try {
      return op(std::move(arguments)...);
    } catch (const std::runtime_error& error) {
      if (!std::strstr(error.what(), "API call failed")) throw;
      if (torch_exception_get_what_without_backtrace) {
        throw std::runtime_error(torch_exception_get_what_without_backtrace());
      }
      const char* memory =
          on_cuda ? "CUDA out of memory." : "DefaultCPUAllocator: can't allocate memory";
      throw std::runtime_error(std::string(memory) + " (most likely: " + error.what() + ")");
    }
  }
};

}  // namespace dgl_ext

#define DGL_EXT_CPU_OP(...) TORCH_BOX((&dgl_ext::Guarded<__VA_ARGS__, false>::call))
#define DGL_EXT_CUDA_OP(...) TORCH_BOX((&dgl_ext::Guarded<__VA_ARGS__, true>::call))
