// What the CTAs of a launch do between two grid-wide syncs: pieces that both heads are made of.
#pragma once

#include "cuda/kernels/gemm_tile.cuh"

namespace dgl_ext {

template <class C>
__device__ __forceinline__ typename C::T* shared_memory() {
  return reinterpret_cast<typename C::T*>(dynamic_shared_memory());
}

/// Consecutive rows of the problem: all of them, or the chunk that a step works on.
struct RowRange {
  int64_t begin, count;
};

/// The rows that this CTA works on: a share of them, one after the other.
__device__ __forceinline__ RowRange own_rows(int64_t rows) {
  const int64_t share = ceil_div(rows, gridDim.x);
  const int64_t begin = smaller(share * blockIdx.x, rows);
  return {begin, smaller(share, rows - begin)};
}

template <class T>
__device__ __forceinline__ Operand<T> operand(const ConstMatrix& m, int64_t first_row = 0) {
  return {static_cast<const T*>(m.data) + first_row * m.stride, m.stride};
}
__device__ __forceinline__ bool is_absent(const uint8_t* present, int64_t row) {
  return present && present[row] == 0;
}

/// One tile of a (rows, columns) output: its products over [begin, end), by runs of neighbours.
/// When they are there, epilogue() returns what takes the runs, f(row, column, v, count): nothing
/// that it works out sits in registers next to the accumulators.
template <class Tile, class C, class Epilogue>
__device__ __forceinline__ void multiply_tile(typename C::T* shared, const TileGrid& grid,
                                              int64_t index, const Operand<typename C::T>& a,
                                              const Operand<typename C::T>& b, int64_t rows,
                                              int64_t columns, int64_t begin, int64_t end,
                                              Epilogue&& epilogue) {
  const int64_t m0 = index / grid.across * C::kRows, n0 = index % grid.across * C::kColumns;
  if (m0 >= rows) return;  // the last chunk of rows may be short
  Tile tile;
  tile.clear();
  tile.accumulate(shared, a, b, m0, rows, n0, columns, begin, end);
  auto f = epilogue();
  tile.for_each_run(shared, m0, rows, n0, columns,
                    [&](int m, int n, typename C::Accumulator(&v)[kRun], int count) {
                      f(m0 + m, n0 + n, v, count);
                    });
}

/// Calls f(row, column, count) for every run of `kRun` neighbours of a matrix (the last of a row
/// may be shorter), flattened over the grid: all threads have work, whatever the shape.
template <int kThreads, class F>
__device__ __forceinline__ void for_each_run_of(int64_t rows, int64_t columns, F&& f) {
  const int64_t runs = ceil_div(columns, kRun);
  if (runs == 0) return;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row_step = step / runs, run_step = step % runs;
  int64_t row = first / runs, run = first % runs;
#pragma unroll 1
  while (row < rows) {
    f(row, run * kRun, int(smaller(columns - run * kRun, kRun)));
    row += row_step;
    run += run_step;
    if (run >= runs) {
      run -= runs;
      ++row;
    }
  }
}

/// A run of neighbours, widened, and zeros beyond `count`; at once where the address allows it, as
/// it does in planes of the workspace (kAligned).
template <bool kAligned = false, class O>
__device__ __forceinline__ void read_run(const O* from, int count, accumulator_t<O> (&v)[kRun]) {
  constexpr int kBytes = int(sizeof(O)) * kRun < 16 ? int(sizeof(O)) * kRun : 16;
  constexpr int kCount = kBytes / int(sizeof(O));
  if (count == kRun && (kAligned || reinterpret_cast<uintptr_t>(from) % kBytes == 0)) {
#pragma unroll
    for (int part = 0; part < kRun; part += kCount) {
      const auto loaded = *reinterpret_cast<const Vector<O, kCount>*>(from + part);
#pragma unroll
      for (int e = 0; e < kCount; ++e) v[part + e] = widen(loaded.v[e]);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < kRun; ++e) v[e] = e < count ? widen(from[e]) : accumulator_t<O>(0);
}
/// v += the sum of a run over `count` split planes, `stride` elements apart, in order.
template <class Accumulator>
__device__ __forceinline__ void add_splits(const Accumulator* p, int64_t splits, int64_t stride,
                                           int count, Accumulator (&v)[kRun]) {
  constexpr int kAhead = 4;  // loads in flight: one after the other each would be a trip to L2
#pragma unroll 1
  for (int64_t s = 0; s < splits; s += kAhead) {
    Accumulator ahead[kAhead][kRun];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      read_run<true>(p + (s + a) * stride, s + a < splits ? count : 0, ahead[a]);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
#pragma unroll
      for (int e = 0; e < kRun; ++e) v[e] += ahead[a][e];
    }
  }
}
/// A run of a bias, zeros where there is none.
template <class T>
__device__ __forceinline__ void read_bias(const void* bias, int64_t column, int count,
                                          accumulator_t<T> (&v)[kRun]) {
  read_run(static_cast<const T*>(bias) + column, bias ? count : 0, v);
}

/// Sums over `rows` for the columns of one tile of `width` runs, a power of two up to
/// the number of threads: value(row, column, count, v) gives a run of one row, and done(column,
/// sum) gets each sum. Threads beyond `width` take other rows; theirs are added in order at the
/// end. Short stretches are summed in the accumulator type and those in double: one running float32
/// sum over 200,000 rows was off by 3e-6.
template <class C, class Value, class Done>
__device__ __forceinline__ void column_sums(typename C::T* shared, int width, RowRange rows,
                                            int64_t columns, int64_t tile, Value&& value,
                                            Done&& done) {
  using Accumulator = typename C::Accumulator;
  constexpr int kStretch = 32;
  auto* partial = reinterpret_cast<double*>(shared);
  const int lanes = C::kThreads / width, lane = threadIdx.x / width;
  const int64_t column = (tile * width + threadIdx.x % width) * kRun;
  const int count = int(smaller(columns - column, kRun));
  const int64_t end = rows.begin + rows.count;
  double sum[kRun] = {};
  if (count > 0) {
#pragma unroll 1
    for (int64_t first = rows.begin + lane; first < end; first += kStretch * lanes) {
      const int64_t last = smaller(first + kStretch * lanes, end);
      Accumulator stretch[kRun] = {};
#pragma unroll 4
      for (int64_t r = first; r < last; r += lanes) {
        Accumulator v[kRun];
        value(r, column, count, v);
#pragma unroll
        for (int e = 0; e < kRun; ++e) stretch[e] += v[e];
      }
#pragma unroll
      for (int e = 0; e < kRun; ++e) sum[e] += stretch[e];
    }
  }
#pragma unroll
  for (int e = 0; e < kRun; ++e) partial[threadIdx.x * kRun + e] = sum[e];
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x; at < width * kRun; at += C::kThreads) {
    double all = partial[at];
#pragma unroll 1
    for (int l = 1; l < lanes; ++l) all += partial[l * width * kRun + at];
    const int64_t here = tile * width * kRun + at;
    if (here < columns) done(here, Accumulator(all));
  }
  __syncthreads();  // shared memory is free again
}

/// A run of row `row` of a matrix of T, widened.
template <class T>
__device__ __forceinline__ void read_run(const ConstMatrix& m, int64_t row, int64_t column,
                                         int count, accumulator_t<T> (&v)[kRun]) {
  read_run(static_cast<const T*>(m.data) + row * m.stride + column, count, v);
}
/// v += factor times a run of row `row`.
template <class T>
__device__ __forceinline__ void add_run(const ConstMatrix& m, int64_t row, int64_t column,
                                        int count, accumulator_t<T> factor,
                                        accumulator_t<T> (&v)[kRun]) {
  accumulator_t<T> more[kRun];
  read_run<T>(m, row, column, count, more);
#pragma unroll
  for (int e = 0; e < kRun; ++e) v[e] += factor * more[e];
}
template <class T>
__device__ __forceinline__ T* address(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<T*>(m.data) + row * m.stride + column;
}
/// Adds what is stored at `to` already, where an earlier chunk of rows has left its sum.
template <class O, class Accumulator, int kCount>
__device__ __forceinline__ void add_stored(const O* to, Accumulator (&v)[kCount], int count) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if (e < count) v[e] += widen(to[e]);
  }
}
/// Copies a matrix to a plane of the workspace, with zeros where a row is absent.
template <class C>
__device__ __forceinline__ void copy_rows(const Operand<typename C::T>& from, typename C::T* to,
                                          int64_t pitch, RowRange rows, int64_t columns,
                                          const uint8_t* present) {
  for_each_run_of<C::kThreads>(rows.count, columns, [&](int64_t row, int64_t column, int count) {
    const bool absent = is_absent(present, rows.begin + row);
    typename C::Accumulator v[kRun];
    read_run(from.data + row * from.stride + column, absent ? 0 : count, v);
    write_run(to + row * pitch + column, v, count);
  });
}
/// Zeros for the rows that are absent: the products gave them a leak's gradient, or NaN.
template <class C, class O>
__device__ __forceinline__ void clear_absent(const Matrix& m, int64_t rows, int64_t columns,
                                             const uint8_t* present) {
  if (!m.data || !present) return;
  for_each_run_of<C::kThreads>(rows, columns, [&](int64_t row, int64_t column, int count) {
    const typename C::Accumulator zeros[kRun] = {};
    if (is_absent(present, row)) write_run(address<O>(m, row, column), zeros, count);
  });
}
/// Part of the workspace, `offset` bytes in.
template <class O>
__device__ __forceinline__ O* workspace_at(void* workspace, int64_t offset) {
  return reinterpret_cast<O*>(static_cast<unsigned char*>(workspace) + offset);
}

}  // namespace dgl_ext
