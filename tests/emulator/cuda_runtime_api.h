// The few names of the CUDA runtime that the launchers use, for builds without CUDA. The emulator's
// folder comes first on the include path, so that launch.h and the launchers need no #ifdef.
#pragma once

#include <cstddef>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

using cudaStream_t = void*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNotSupported = 801,
};

inline cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return "as the emulator says"; }
