// Forward launch of the FiLM head: modulation, three sets of hidden features, three sets of logits.
#pragma once

#include "cuda/kernels/phases.cuh"

namespace dgl_ext {

struct FilmForwardArguments {
  FilmHeadForward problem;
  FilmForwardPlan plan;
  void* workspace;
};

/// A run of y, zeros where y is absent.
template <class T>
__device__ __forceinline__ void read_target(const FilmHead& head, int64_t row, int64_t column,
                                            int count, accumulator_t<T> (&v)[kRun]) {
  read_run<T>(head.target, row, column, is_absent(head.present[1], row) ? 0 : count, v);
}

template <class C>
struct FilmForward {
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;
  using Tile = GemmTile<C, Major::kDepth, Major::kDepth>;
  using Arguments = FilmForwardArguments;
  static constexpr int kSharedBytes = Tile::kSharedBytes;

  static __device__ __forceinline__ void run(const Arguments& args) {
    T* shared = shared_memory<C>();
    const RowRange all{0, args.problem.head.rows};
    multiply_film(args, shared, all);
    grid_sync();
    modulate(args, all);
    grid_sync();
    multiply_head<false>(args, shared, all);
    if (args.plan.head_splits == 1) return;
    grid_sync();
    write_logits(args, all);
  }

  // Rows count from the first of their chunk, as the workspace and the saved modulation do.

  /// Partial sums of gamma (half 0) and beta (half 1): planes of (rows, 2 padded_hidden).
  static __device__ __forceinline__ Accumulator* film_partial(const Arguments& args, int64_t split,
                                                              int64_t half, int64_t row,
                                                              int64_t column) {
    const int64_t pitch = args.plan.padded_hidden;
    return static_cast<Accumulator*>(args.workspace) +
           (split * args.plan.plane_rows + row) * 2 * pitch + half * pitch + column;
  }
  /// Hidden features of branch k: 0 fused, 1 x alone, 2 y alone.
  static __device__ __forceinline__ T* features(const Arguments& args, int64_t branch) {
    return workspace_at<T>(args.workspace, args.plan.features_offset) +
           branch * args.plan.plane_rows * args.plan.padded_hidden;
  }
  static __device__ __forceinline__ Accumulator* head_partial(const Arguments& args, int64_t split,
                                                              int64_t branch, int64_t row,
                                                              int64_t column) {
    return workspace_at<Accumulator>(args.workspace, args.plan.head_partial_offset) +
           ((split * 3 + branch) * args.plan.plane_rows + row) * args.plan.padded_classes + column;
  }
  static __device__ __forceinline__ void multiply_film(const Arguments& args, T* shared,
                                                       RowRange rows) {
    const FilmHead& head = args.problem.head;
    const TileGrid& tiles = args.plan.film;
    const int64_t items = args.plan.film_splits * 2 * tiles.count;
#pragma unroll 1
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      const int64_t half = item / tiles.count % 2, split = item / tiles.count / 2;
      const int64_t begin = split * args.plan.film_depth;
      Operand<T> weight = operand<T>(head.film_weight);
      weight.data += half * head.hidden * weight.stride;
      multiply_tile<Tile, C>(
          shared, tiles, item % tiles.count, operand<T>(head.condition, rows.begin), weight,
          rows.count, head.hidden, begin,
          smaller(begin + args.plan.film_depth, head.condition_width), [&] {
            return [&](int64_t row, int64_t column, Accumulator(&v)[kRun], int count) {
              write_run(film_partial(args, split, half, row, column), v, count);
            };
          });
    }
  }

  /// h = gamma y + beta; h_x = beta (y absent); h_y = b_gamma y + b_beta (x absent).
  static __device__ __forceinline__ void modulate(const Arguments& args, RowRange rows) {
    const FilmHeadForward& p = args.problem;
    const int64_t hidden = p.head.hidden, pitch = args.plan.padded_hidden;
    const int64_t plane = args.plan.plane_rows * 2 * pitch;
    for_each_run_of<C::kThreads>(rows.count, hidden, [&](int64_t row, int64_t column, int count) {
      Accumulator bias_gamma[kRun], bias_beta[kRun], y[kRun], gamma[kRun] = {}, beta[kRun] = {};
      if (!is_absent(p.head.present[0], rows.begin + row)) {
        const int64_t splits = args.plan.film_splits;
        add_splits(film_partial(args, 0, 0, row, column), splits, plane, count, gamma);
        add_splits(film_partial(args, 0, 1, row, column), splits, plane, count, beta);
      }
      read_target<T>(p.head, rows.begin + row, column, count, y);
      read_bias<T>(p.head.film_bias, column, count, bias_gamma);
      read_bias<T>(p.head.film_bias, hidden + column, count, bias_beta);
      Accumulator h[3][kRun];
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        gamma[e] += bias_gamma[e];
        beta[e] += bias_beta[e];
        h[0][e] = gamma[e] * y[e] + beta[e];
        h[1][e] = beta[e];
        h[2][e] = bias_gamma[e] * y[e] + bias_beta[e];
      }
      write_run(address<Accumulator>(p.modulation, row, column), gamma, count);
      write_run(address<Accumulator>(p.modulation, row, hidden + column), beta, count);
#pragma unroll
      for (int k = 0; k < 3; ++k) write_run(features(args, k) + row * pitch + column, h[k], count);
    });
  }

  /// To the logits themselves, or as partial sums where k is split and in a step.
  template <bool kPartial>
  static __device__ __forceinline__ void multiply_head(const Arguments& args, T* shared,
                                                       RowRange rows) {
    const FilmHeadForward& p = args.problem;
    const TileGrid& tiles = args.plan.head;
    const int64_t items = args.plan.head_splits * 3 * tiles.count;
#pragma unroll 1
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
      const int64_t branch = item / tiles.count % 3, split = item / tiles.count / 3;
      const int64_t begin = split * args.plan.head_depth;
      multiply_tile<Tile, C>(
          shared, tiles, item % tiles.count, {features(args, branch), args.plan.padded_hidden},
          operand<T>(p.head.out_weight), rows.count, p.head.classes, begin,
          smaller(begin + args.plan.head_depth, p.head.hidden), [&] {
            return [&](int64_t row, int64_t column, Accumulator(&v)[kRun], int count) {
              if (kPartial || args.plan.head_splits > 1) {
                write_run(head_partial(args, split, branch, row, column), v, count);
              } else {
                add_bias(p, column, v, count);
                write_run(address<T>(logits(p, branch), row, column), v, count);
              }
            };
          });
    }
  }

  /// Logits of all branches from their partial sums.
  static __device__ __forceinline__ void write_logits(const Arguments& args, RowRange rows) {
    const FilmHeadForward& p = args.problem;
    const int64_t plane = 3 * args.plan.plane_rows * args.plan.padded_classes;
#pragma unroll 1
    for (int k = 0; k < 3; ++k) {
      const auto write = [&](int64_t row, int64_t column, int count) {
        Accumulator v[kRun] = {};
        add_splits(head_partial(args, 0, k, row, column), args.plan.head_splits, plane, count, v);
        add_bias(p, column, v, count);
        write_run(address<T>(logits(p, k), rows.begin + row, column), v, count);
      };
      for_each_run_of<C::kThreads>(rows.count, p.head.classes, write);
    }
  }

 private:
  static __device__ __forceinline__ const Matrix& logits(const FilmHeadForward& p, int64_t branch) {
    return branch == 0 ? p.fused : p.unimodal[branch - 1];
  }

  static __device__ __forceinline__ void add_bias(const FilmHeadForward& p, int64_t column,
                                                  Accumulator (&v)[kRun], int count) {
    Accumulator bias[kRun];
    read_bias<T>(p.head.out_bias, column, count, bias);
#pragma unroll
    for (int e = 0; e < kRun; ++e) v[e] += bias[e];
  }
};

}  // namespace dgl_ext
