// The few names of the CUDA runtime that the launchers use, for builds without CUDA. The emulator's
// folder comes first on the include path, so that launch.h and the launchers need no #ifdef.
#pragma once

#include <cstddef>
#include <cstring>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

using cudaStream_t = void*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
};

inline cudaError_t cudaMemset2DAsync(void* data, size_t pitch, int value, size_t width,
                                     size_t height, cudaStream_t) {
  for (size_t row = 0; row < height; ++row)
    memset(static_cast<char*>(data) + row * pitch, value, width);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "as the emulator says"; }
