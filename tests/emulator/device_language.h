// CUDA C++ as the kernels use it, spelled for g++: qualifiers, built-in variables, 16-bit types,
// barriers, shuffles. Included, by way of intrinsics.h, where nvcc does not compile.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulator::context->thread)
#define blockIdx (emulator::context->block)
#define gridDim (emulator::context->grid_size)
#define __syncthreads() emulator::block_barrier(__FILE__, __LINE__)

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t wide = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
inline float __half2float(__half h) { return float(h.value); }
inline __half __float2half_rn(float f) { return {_Float16(f)}; }
