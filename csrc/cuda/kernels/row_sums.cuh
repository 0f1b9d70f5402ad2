// Sums over rows, which the gradients of weights and biases are: written at once, added to those of
// earlier chunks of rows, or kept as partial sums that are added in the end.
#pragma once

#include "cuda/kernels/phases.cuh"

namespace dgl_ext {

/// kStep: of a training step, whose rows may come in chunks and whose sums are scaled in the end.
template <class C, bool kStep>
struct RowSums {
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;
  using Output = std::conditional_t<kStep && std::is_same_v<T, f16>, float, T>;

  /// Writes sums over the rows of a chunk, or adds them to those of the chunks before.
  template <class O, int kCount>
  static __device__ __forceinline__ void write_sum(O* to, Accumulator (&v)[kCount], int count,
                                                   RowRange rows) {
    if (kStep && rows.begin > 0) add_stored(to, v, count);
    write_run(to, v, count);
  }
  template <int kCount>
  static __device__ __forceinline__ void multiply_all(Accumulator (&v)[kCount], Accumulator scale) {
    if constexpr (kStep) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) v[e] *= scale;
    }
  }

  /// A tile of a bias's gradient, summed over the rows [begin, end) of a chunk: to `partial` if
  /// that is not null. value(row, column, count, v) gives a run of what is summed.
  template <class Value>
  static __device__ __forceinline__ void bias_tile(T* shared, RowRange rows, int64_t begin,
                                                   int64_t end, int64_t columns, int64_t tile,
                                                   Accumulator scale, Accumulator* partial,
                                                   void* bias, Value&& value) {
    column_sums<C>(shared, kColumnTile / kRun, begin, end, columns, tile, value,
                   [&](int64_t column, Accumulator sum) {
                     Accumulator v[1] = {sum};
                     multiply_all(v, scale);
                     if (partial) {
                       write_sum(partial + column, v, 1, rows);
                     } else {
                       write_sum(static_cast<Output*>(bias) + column, v, 1, rows);
                     }
                   });
  }

  /// The same over the rows of this CTA's share, for all columns, as its partial sums.
  template <class Value>
  static __device__ __forceinline__ void sum_own_rows(T* shared, RowRange rows, int64_t columns,
                                                      Accumulator* partial, Value&& value) {
    const RowRange own = own_rows(rows.count);
    int width = C::kThreads;
    while (width > 1 && int64_t(width / 2) * kRun >= columns) width /= 2;
#pragma unroll 1
    for (int64_t tile = 0; tile * width * kRun < columns; ++tile) {
      column_sums<C>(shared, width, own.begin, own.begin + own.count, columns, tile, value,
                     [&](int64_t column, Accumulator sum) {
                       Accumulator* to = partial + column;
                       *to = kStep && rows.begin > 0 ? *to + sum : sum;
                     });
    }
  }

  /// Adds the partial sums of a bias's gradient, `pitch` apart, in order, a tile of columns at a
  /// time. `item` counts this CTA's work from the first tile of this bias on.
  static __device__ __forceinline__ void add_bias(T* shared, Accumulator scale, void* bias,
                                                  const Accumulator* partial, int64_t splits,
                                                  int64_t pitch, int64_t columns, int64_t& item) {
    if (!bias) return;
    const int64_t tiles = ceil_div(columns, kColumnTile);
#pragma unroll 1
    for (; item < tiles; item += gridDim.x) {
      column_sums<C>(
          shared, kColumnTile / kRun, 0, splits, columns, item,
          [&](int64_t split, int64_t column, int count, Accumulator(&v)[kRun]) {
            read_run(partial + split * pitch + column, count, v);
          },
          [&](int64_t column, Accumulator sum) {
            static_cast<Output*>(bias)[column] = narrow<Output>(sum * scale);
          });
    }
    item -= tiles;
  }
};

}  // namespace dgl_ext
