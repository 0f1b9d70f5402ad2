// Brings a block of a matrix from global to shared memory; what lies outside arrives as zeros.
#pragma once

#include "cuda/kernels/intrinsics.cuh"

namespace dgl_ext {

/// A block of kRows x kColumns (columns contiguous in memory), all kThreads threads taking part.
/// kAligned: base and stride are multiples of 16 bytes, and the block starts at such a column.
template <class T, int kRows, int kColumns, int kPadding, int kThreads, bool kAligned>
struct TileLoader {
  static constexpr int kPitch = kColumns + kPadding, kElements = kRows * kPitch;

  /// `rows` x `columns` of the block exist (each at least 1, and possibly the whole block).
  static __device__ __forceinline__ void load(T* shared, const T* global, int64_t stride, int rows,
                                              int columns) {
    if constexpr (kAligned) {
      load_aligned(shared, global, stride, rows, columns);
    } else if constexpr (sizeof(T) >= 4) {
      load_elements(shared, global, stride, rows, columns);
    } else {
      load_halves(shared, global, stride, rows, columns);
    }
  }

 private:
  /// A thread keeps its 16-byte column and steps down the rows.
  static __device__ __forceinline__ void load_aligned(T* shared, const T* global, int64_t stride,
                                                      int rows, int columns) {
    constexpr int kChunk = 16 / sizeof(T), kChunks = kColumns / kChunk;
    static_assert(kThreads % kChunks == 0, "every row must be covered by whole thread groups");
    constexpr int kRowStep = kThreads / kChunks;
    const int row = threadIdx.x / kChunks, column = threadIdx.x % kChunks * kChunk;
    const int inside = columns - column;
    const int bytes = (inside < 0 ? 0 : inside > kChunk ? kChunk : inside) * int(sizeof(T));
    const T* source = global + row * stride + column;
    T* target = shared + row * kPitch + column;
#pragma unroll
    for (int r = 0; r < kRows; r += kRowStep) {
      if (kRows % kRowStep != 0 && row + r >= kRows) break;
      const bool exists = row + r < rows && bytes > 0;
      copy_async<16>(target + r * kPitch, exists ? source : global, exists ? bytes : 0);
      source += kRowStep * stride;
    }
  }

  static __device__ __forceinline__ void load_elements(T* shared, const T* global, int64_t stride,
                                                       int rows, int columns) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
      const int r = i / kColumns, c = i % kColumns;
      const bool exists = r < rows && c < columns;
      copy_async<sizeof(T)>(shared + r * kPitch + c, exists ? global + r * stride + c : global,
                            exists ? int(sizeof(T)) : 0);
    }
  }

  /// cp.async moves at least 4 bytes: 16-bit elements pass through registers, several at a time.
  static __device__ __forceinline__ void load_halves(T* shared, const T* global, int64_t stride,
                                                     int rows, int columns) {
    constexpr int kInFlight = 8;
#pragma unroll 1
    for (int first = threadIdx.x; first < kRows * kColumns; first += kThreads * kInFlight) {
      T v[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int i = first + u * kThreads, r = i / kColumns, c = i % kColumns;
        v[u] = r < rows && c < columns ? global[r * stride + c] : narrow<T>(0.f);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        const int i = first + u * kThreads;
        if (i < kRows * kColumns) shared[i / kColumns * kPitch + i % kColumns] = v[u];
      }
    }
  }
};

}  // namespace dgl_ext
