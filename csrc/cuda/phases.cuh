// What the CTAs of a launch do between two grid-wide syncs: pieces that both heads are made of.
#pragma once

#include "gemm_tile.cuh"

namespace dgl_ext {

constexpr int kColumnTile = 32;  ///< columns of one bias sum: a warp's width

/// Consecutive rows of the problem: all of them, or the chunk that a step works on.
struct RowRange {
  int64_t begin, count;
};

template <class T>
__device__ __forceinline__ Operand<T> operand(const ConstMatrix& m, int64_t first_row = 0) {
  return {static_cast<const T*>(m.data) + first_row * m.stride, m.stride};
}
__device__ __forceinline__ bool is_absent(const uint8_t* present, int64_t row) {
  return present && present[row] == 0;
}

/// The row-major matrix of tiles that covers an output. Counted on the host (count_tiles of each
/// head) and passed as a kernel argument: the tile loops then read it from constant memory, where
/// values computed in the kernel would sit in registers next to the accumulators.
struct TileGrid {
  int64_t across = 0, count = 0;

  template <class C>
  static TileGrid of(int64_t rows, int64_t columns) {
    const int64_t across = ceil_div(columns, C::kColumns);
    return {across, ceil_div(rows, C::kRows) * across};
  }
  template <class C>
  __device__ int64_t row(int64_t tile) const {
    return tile / across * C::kRows;
  }
  template <class C>
  __device__ int64_t column(int64_t tile) const {
    return tile % across * C::kColumns;
  }
};

/// Fixed order: the result does not depend on which CTA finished first.
template <class Accumulator>
__device__ __forceinline__ Accumulator sum_splits(const Accumulator* p, int64_t count,
                                                  int64_t stride) {
  Accumulator sum = 0;
#pragma unroll 4
  for (int64_t i = 0; i < count; ++i) sum += p[i * stride];
  return sum;
}

/// Calls f(row, column) for every element of a matrix: a warp per row, lanes along the columns.
template <class C, class F>
__device__ __forceinline__ void for_each_element(int64_t rows, int64_t columns, F&& f) {
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * C::kWarps;
#pragma unroll 1
  for (int64_t r = int64_t(blockIdx.x) * C::kWarps + threadIdx.x / 32; r < rows; r += step) {
#pragma unroll 1
    for (int64_t c = lane; c < columns; c += 32) f(r, c);
  }
}

/// Sums value(row, column) over rows [begin, end) for the columns of one column tile and hands
/// done(column, sum) the result. Warps take every kWarps-th row; then warp 0 adds them in order.
/// Short runs are summed in the accumulator type and those in double: one running float32 sum over
/// 200,000 rows was off by 3e-6.
template <class C, class Value, class Done>
__device__ __forceinline__ void column_sums(typename C::T* shared, int64_t begin, int64_t end,
                                            int64_t columns, int64_t tile, Value&& value,
                                            Done&& done) {
  using Accumulator = typename C::Accumulator;
  constexpr int64_t kRunRows = 32 * C::kWarps;
  auto* partial = reinterpret_cast<double*>(shared);
  const int warp = threadIdx.x / 32;
  const int64_t column = tile * kColumnTile + threadIdx.x % 32;
  double sum = 0;
  if (column < columns) {
#pragma unroll 1
    for (int64_t first = begin; first < end; first += kRunRows) {
      const int64_t last = smaller(first + kRunRows, end);
      Accumulator run = 0;
#pragma unroll 4
      for (int64_t r = first + warp; r < last; r += C::kWarps) run += value(r, column);
      sum += run;
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  if (warp == 0 && column < columns) {
#pragma unroll 1
    for (int w = 1; w < C::kWarps; ++w) sum += partial[w * 32 + threadIdx.x];
    done(column, Accumulator(sum));
  }
  __syncthreads();  // shared memory is free again
}

/// Element (row, column) of a matrix of T, widened.
template <class T>
__device__ __forceinline__ accumulator_t<T> element(const ConstMatrix& m, int64_t row,
                                                    int64_t column) {
  return widen(static_cast<const T*>(m.data)[row * m.stride + column]);
}
template <class T>
__device__ __forceinline__ T* address(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<T*>(m.data) + row * m.stride + column;
}
/// bias[column], or 0 where there is none.
template <class T>
__device__ __forceinline__ accumulator_t<T> bias_at(const void* bias, int64_t column) {
  return bias ? widen(static_cast<const T*>(bias)[column]) : accumulator_t<T>(0);
}
/// Adds what is stored at `to` already, where an earlier chunk of rows has left its sum.
template <class O, class Accumulator, int kCount>
__device__ __forceinline__ void add_stored(const O* to, Accumulator (&v)[kCount], int count) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if (e < count) v[e] += widen(to[e]);
  }
}
/// Part of the workspace, `offset` bytes in.
template <class O>
__device__ __forceinline__ O* workspace_at(void* workspace, int64_t offset) {
  return reinterpret_cast<O*>(static_cast<unsigned char*>(workspace) + offset);
}

}  // namespace dgl_ext
