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
  using WeightTile = GemmTile<C, Major::kOuter, Major::kOuter>;   // g^T h: k = rows
  using FeatureTile = GemmTile<C, Major::kDepth, Major::kOuter>;  // g W: k = classes
  static constexpr int kSharedBytes = greatest(WeightTile::kSharedBytes, FeatureTile::kSharedBytes);

  /// Writes sums over the rows of a chunk, or adds them to those of the chunks before.
  template <class O, int kCount>
  static __device__ __forceinline__ void write_sum(O* to, Accumulator (&v)[kCount], int count,
                                                   RowRange rows) {
    if (kStep && rows.begin > 0) add_stored(to, v, count);
    write_run(to, v, count);
  }
  template <int kCount>
  static __device__ __forceinline__ void multiply_all(Accumulator (&v)[kCount], Accumulator scale) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) v[e] *= scale;
  }
  /// The rows of a chunk that a split of their sums takes.
  static __device__ __forceinline__ RowRange split_of(int64_t split, int64_t rows_per_split,
                                                      int64_t rows) {
    const int64_t begin = split * rows_per_split;
    return {begin, smaller(rows_per_split, rows - begin)};
  }

  /// A tile of a feature's gradient for the rows of a chunk, which are those of `a`. find() says
  /// where it goes.
  struct FeatureTarget {
    const Matrix& output;
    const uint8_t* present;
    Accumulator scale;
  };
  template <class Find>
  static __device__ __forceinline__ void feature_tile(T* shared, const TileGrid& grid,
                                                      int64_t index, const Operand<T>& a,
                                                      const Operand<T>& b, int64_t depth,
                                                      int64_t width, RowRange rows, Find&& find) {
    multiply_tile<FeatureTile, C>(shared, grid, index, a, b, rows.count, width, 0, depth, [&] {
      return [rows, to = find()](int64_t m, int64_t column, Accumulator(&v)[kRun], int count) {
        const int64_t row = rows.begin + m;
        const bool absent = is_absent(to.present, row);
#pragma unroll
        for (int e = 0; e < kRun; ++e) v[e] = absent ? Accumulator(0) : v[e] * to.scale;
        write_run(address<Output>(to.output, row, column), v, count);
      };
    });
  }

  /// A tile of a weight's gradient, summed over `split`, which are rows of a chunk.
  struct WeightTarget {
    Output* output;
    int64_t stride;
    Accumulator* partial;  ///< instead of `output` if not null
    int64_t pitch;
    Accumulator scale;
  };
  template <class Find>
  static __device__ __forceinline__ void weight_tile(T* shared, const TileGrid& grid, int64_t index,
                                                     const Operand<T>& a, const Operand<T>& b,
                                                     int64_t outputs, int64_t width, RowRange split,
                                                     RowRange rows, Find&& find) {
    const int64_t end = split.begin + split.count;
    multiply_tile<WeightTile, C>(shared, grid, index, a, b, outputs, width, split.begin, end, [&] {
      return [rows, to = find()](int64_t row, int64_t column, Accumulator(&v)[kRun], int count) {
        multiply_all(v, to.scale);
        if (to.partial) {
          write_sum(to.partial + row * to.pitch + column, v, count, rows);
        } else {
          write_sum(to.output + row * to.stride + column, v, count, rows);
        }
      };
    });
  }

  /// Adds the partial sums of a weight's gradient, `plane` elements apart, in order.
  static __device__ __forceinline__ void add_weight(const Matrix& output, int64_t outputs,
                                                    int64_t width, const Accumulator* partial,
                                                    int64_t splits, int64_t plane, int64_t pitch) {
    const auto add = [&](int64_t row, int64_t column, int count) {
      Accumulator v[kRun] = {};
      add_splits(partial + row * pitch + column, splits, plane, count, v);
      write_run(address<Output>(output, row, column), v, count);
    };
    for_each_run_of<C::kThreads>(outputs, width, add);
  }

  /// A tile of a bias's gradient, summed over `split` in the same way. value(row, column, count,
  /// v) gives a run of what is summed.
  template <class Value>
  static __device__ __forceinline__ void bias_tile(T* shared, RowRange rows, RowRange split,
                                                   int64_t columns, int64_t tile, Accumulator scale,
                                                   Accumulator* partial, void* bias,
                                                   Value&& value) {
    column_sums<C>(shared, kColumnTile / kRun, split, columns, tile, value,
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
      column_sums<C>(shared, width, own, columns, tile, value,
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
          shared, kColumnTile / kRun, {0, splits}, columns, item,
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
