// What the binding asks of torch about CUDA: device, guard, stream, dispatch key. The tests have a
// header of the same name for running the binding over the emulator.
#pragma once

// The stable shims for streams are declared under this name only.
#ifndef USE_CUDA
#define USE_CUDA
#endif

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/util/shim_utils.h>

#define DGL_EXT_DISPATCH_KEY CUDA

struct cublasContext;

namespace dgl_ext {

using torch::stable::accelerator::DeviceGuard;

constexpr auto kDeviceType = torch::headeronly::DeviceType::CUDA;
constexpr bool kOnCuda = true;

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

/// cuBLAS as torch uses it here: on the current stream, with torch's workspace and math mode.
inline cublasContext* blas_handle() {
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  return static_cast<cublasContext*>(handle);
}

}  // namespace dgl_ext
