// What intrinsics.cuh has for nvcc, on the emulator.
#pragma once

#include "warp_instructions.h"

namespace dgl_ext {

inline unsigned char* dynamic_shared_memory() { return emulator::context->shared; }
inline void grid_sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::grid_barrier(file, line);
}
// forced inline: the emulator reports the return address as the place of the copy
template <int kBytes>
[[gnu::always_inline]] inline void copy_async(void* shared, const void* global, int source_bytes) {
  emulator::copy_async(shared, global, kBytes, source_bytes);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int kPending>
void copy_async_wait() {
  emulator::copy_async_wait(kPending);
}
template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], const void* row) {
  emulator::ldmatrix_x4(r, row, kTransposed);
}
template <class T>
void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, float>) {
    emulator::mma_1688_tf32(d, a, b);
  } else {
    emulator::mma_16816<T>(d, a, b);
  }
}
inline uint32_t round_to_tf32(uint32_t bits) {
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;  // the sum would carry into the exponent
  return nan ? bits : (bits + 0x1000u) & 0xffffe000u;
}

template <class V>
V warp_exchange(V value, int mask) {
  return emulator::shuffle(value, int(threadIdx.x % 32) ^ mask);
}
inline void warp_sync() { emulator::sync_warp(); }
inline void hide_origin(int64_t&) {}
inline int warp_count(bool predicate) { return emulator::count_lanes(predicate); }
inline void require(bool condition, const char* what) {
  if (!condition) emulator::fail(std::string("device-side assertion: ") + what);
}

template <class Arguments>
cudaError_t launch_kernel(void (*kernel)(Arguments), int grid, int block, int shared_bytes,
                          bool cooperative, Arguments arguments, cudaStream_t) {
  const int limit = emulator::cooperative_limit();
  if (cooperative && limit > 0 && grid > limit) return cudaErrorCooperativeLaunchTooLarge;
  emulator::launch(dim3{unsigned(grid)}, dim3{unsigned(block)}, shared_bytes, cooperative,
                   [&] { kernel(arguments); });
  return cudaSuccess;
}
template <class Arguments>
cudaError_t occupancy(void (*)(Arguments), int, int, int* ctas) {
  *ctas = 1;
  return cudaSuccess;
}

}  // namespace dgl_ext
