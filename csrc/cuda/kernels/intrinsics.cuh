// The device instructions the kernels use, one wrapper each: PTX for nvcc. For g++ the emulator has
// the same wrappers (tests/emulator/intrinsics.h). Nothing else in the kernels knows which of the
// two compiles them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <intrinsics.h>
#endif

namespace dgl_ext {

using bf16 = __nv_bfloat16;
using f16 = __half;

#ifdef __CUDACC__

__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

/// Waits for all CTAs of a cooperative launch; memory written before is visible after.
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// Starts copying kBytes (4, 8 or 16) to shared memory; bytes beyond `source_bytes` become 0.
/// 16-byte copies bypass L1; both ends must be aligned to kBytes.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int source_bytes) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
                 "l"(global), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;\n" ::"r"(shared_address(shared)),
                 "l"(global), "r"(source_bytes), "n"(kBytes)
                 : "memory");
  }
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
/// Waits until at most kPending of this thread's groups are still under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

/// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

/// d += a b for one 16x8 fragment: 16 deep for bf16 and f16, 8 deep for float (read as tf32).
template <class T>
__device__ __forceinline__ void multiply_fragments(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, f16>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

/// Rounds the bits of a float to tf32, to nearest with ties away from zero.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

/// The value of lane `lane ^ mask`, and of how many lanes the predicate holds; all 32 lanes take
/// part.
template <class V>
__device__ __forceinline__ V warp_exchange(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ __forceinline__ int warp_count(bool predicate) {
  return __popc(__ballot_sync(0xffffffffu, predicate));
}

/// Orders what the lanes of a warp write to shared memory before what they read after.
__device__ __forceinline__ void warp_sync() { __syncwarp(); }

/// Hides where a value came from: the compiler then keeps the value itself in registers, and not a
/// dozen addresses that it worked out ahead.
__device__ __forceinline__ void hide_origin(int64_t& value) { asm volatile("" : "+l"(value)); }

/// Stops the launch with a device-side assertion, also where NDEBUG silences assert().
__device__ __forceinline__ void require(bool condition, const char* what) {
  if (!condition) __assert_fail(what, __FILE__, __LINE__, "dgl_ext");
}

/// Lets a kernel of the current device have its shared memory. Up to 48 KiB need no asking; beyond,
/// `occupancy` asks once, when the device is first met, and no launch does again.
inline cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

/// Launches on `stream`. A cooperative grid must fit the device, else an error comes back.
template <class Arguments>
cudaError_t launch_kernel(void (*kernel)(Arguments), int grid, int block, int shared_bytes,
                          bool cooperative, Arguments arguments, cudaStream_t stream) {
  const void* function = reinterpret_cast<const void*>(kernel);
  void* parameters[] = {&arguments};
  return cooperative ? cudaLaunchCooperativeKernel(function, dim3(grid), dim3(block), parameters,
                                                   shared_bytes, stream)
                     : cudaLaunchKernel(function, dim3(grid), dim3(block), parameters, shared_bytes,
                                        stream);
}

/// CTAs of this kernel that one multiprocessor of the current device can hold.
template <class Arguments>
cudaError_t occupancy(void (*kernel)(Arguments), int block, int shared_bytes, int* ctas) {
  const void* function = reinterpret_cast<const void*>(kernel);
  const cudaError_t status = allow_shared_memory(function, shared_bytes);
  if (status != cudaSuccess) return status;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(ctas, function, block, shared_bytes);
}

#endif

// ---- arithmetic types: the same for both

/// The type that sums are kept in.
template <class T>
using accumulator_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(f16 v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T narrow(accumulator_t<T> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(v);
  } else if constexpr (std::is_same_v<T, f16>) {
    return __float2half_rn(v);
  } else {
    return v;
  }
}

__device__ __forceinline__ double exponential(double v) { return exp(v); }
__device__ __forceinline__ float exponential(float v) { return expf(v); }
__device__ __forceinline__ double logarithm(double v) { return log(v); }
__device__ __forceinline__ float logarithm(float v) { return logf(v); }

/// kCount neighbours that are loaded or stored at once.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T v[kCount];
};

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int greatest(int a, int b, int c = 0) {
  return a > b ? (a > c ? a : c) : (b > c ? b : c);
}
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace dgl_ext
