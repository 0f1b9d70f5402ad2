// The binding over the emulator: its tensors are on the CPU, and there are no streams.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/headeronly/core/DeviceType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

#define DGL_EXT_DISPATCH_KEY CPU

struct cublasContext;

namespace dgl_ext {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

constexpr auto kDeviceType = torch::headeronly::DeviceType::CPU;
constexpr bool kOnCuda = false;

inline cudaStream_t current_stream(int32_t) { return nullptr; }

// host_cublas.cpp has one for everybody.
inline cublasContext* blas_handle() { return nullptr; }

}  // namespace dgl_ext
