// Gradients of the FiLM head (formulas: FilmHeadBackward in problem.h), in phases of which the
// backward launch and the training step are made:
//   prepare   hidden features again from the saved modulation; aligned copies of the gradients
//   head      d[k] = g_k W_o for the branches k that are needed; grad_out_weight, grad_out_bias
//   combine   d[k] -> gradients of the modulation, for the parameters and for x; grad_target
//   film      grad_film_weight, grad_condition, grad_film_bias
// Where there are many rows, sums over rows go to the workspace in pieces; a fifth phase adds them.
// In a step the g_k are planes of residuals, scaled in the end, and rows may come in chunks.
#pragma once

#include "cuda/kernels/film_planes.cuh"

namespace dgl_ext {

template <class C, bool kStep>
struct FilmGradients : FilmPlanes<C, kStep> {
  using Planes = FilmPlanes<C, kStep>;
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;
  using WeightTile = GemmTile<C, Major::kOuter, Major::kOuter>;   // g^T h: k = rows
  using FeatureTile = GemmTile<C, Major::kDepth, Major::kOuter>;  // g W
  using Output = typename Planes::Output;
  using Arguments = FilmBackwardArguments;
  using Planes::add_branch;
  using Planes::bias_partial;
  using Planes::branch_at;
  using Planes::features;
  using Planes::film_weight_partial;
  using Planes::for_encoder;
  using Planes::for_parameters;
  using Planes::gradient;
  using Planes::gradient_copy;
  using Planes::incoming;
  using Planes::masked_condition;
  using Planes::multiply_all;
  using Planes::out_weight_partial;
  using Planes::read_branch;
  using Planes::scale_of;
  using Planes::write_sum;
  static constexpr int kSharedBytes = WeightTile::kSharedBytes > FeatureTile::kSharedBytes
                                          ? WeightTile::kSharedBytes
                                          : FeatureTile::kSharedBytes;

  static void count_tiles(Arguments& args) {
    const FilmHeadBackward& p = args.problem;
    args.out_weight = TileGrid::of<C>(p.head.classes, p.head.hidden);
    args.branch = TileGrid::of<C>(args.plan.plane_rows, p.head.hidden);
    args.film_weight = TileGrid::of<C>(p.head.hidden, p.head.condition_width);
    args.condition = TileGrid::of<C>(args.plan.plane_rows, p.head.condition_width);
    const int64_t splits = args.plan.row_splits;
    int branches = 0;
    for (int k = 0; k < 3; ++k) branches += args.plan.need_branch[k];
    args.out_weight_end = p.grad_out_weight.data ? args.out_weight.count * args.plan.out_splits : 0;
    args.branch_end = args.out_weight_end + branches * args.branch.count;
    args.head_end =
        args.branch_end + (p.grad_out_bias ? ceil_div(p.head.classes, kColumnTile) * splits : 0);
    args.film_weight_end = p.grad_film_weight.data ? 2 * args.film_weight.count * splits : 0;
    args.condition_end = args.film_weight_end + (p.grad_condition.data ? args.condition.count : 0);
    args.film_end = args.condition_end +
                    (p.grad_film_bias ? 2 * ceil_div(p.head.hidden, kColumnTile) * splits : 0);
  }
  // ---- prepare

  static __device__ __forceinline__ void copy_gradients(const Arguments& args, RowRange rows) {
    const FilmHeadBackward& p = args.problem;
#pragma unroll 1
    for (int k = 0; k < 3; ++k) {
      if (!args.plan.copy_gradients) break;
      if (!args.plan.need_branch[k] && !args.plan.to_out_weight[k]) continue;
      const ConstMatrix& from = incoming(p, k);
      T* to = gradient_copy(args, k, rows);
      copy_rows<C>(operand<T>(from), to, args.plan.padded_classes, rows, p.head.classes, nullptr);
    }
  }

  static __device__ __forceinline__ void prepare_features(const Arguments& args, RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    if (p.grad_film_weight.data && args.plan.masked.pitch > 0) {
      copy_rows<C>(operand<T>(p.head.condition, rows.begin), masked_condition(args),
                   args.plan.masked.pitch, rows, p.head.condition_width, p.head.present[0]);
    }
    if (!p.grad_out_weight.data || args.plan.features_ready) return;
    const Accumulator leak = p.leaks.head;
    const int64_t hidden = p.head.hidden;
    const auto prepare = [&](int64_t row, int64_t column, int count) {
      Accumulator gamma[kRun], beta[kRun], y[kRun];
      read_run<Accumulator>(p.modulation, row, column, count, gamma);
      read_run<Accumulator>(p.modulation, row, hidden + column, count, beta);
      read_target<T>(p.head, rows.begin + row, column, count, y);
      const int64_t at = row * args.plan.padded_hidden + column;
      Accumulator v[kRun];
      if (args.plan.to_out_weight[0]) {
#pragma unroll
        for (int e = 0; e < kRun; ++e) v[e] = gamma[e] * y[e] + beta[e];
        write_run(features(args, 0, rows) + at, v, count);
      }
      if (args.plan.to_out_weight[1]) {
#pragma unroll
        for (int e = 0; e < kRun; ++e) v[e] = leak * beta[e];
        write_run(features(args, 1, rows) + at, v, count);
      }
      if (args.plan.to_out_weight[2]) {
        read_bias<T>(p.head.film_bias, column, count, gamma);
        read_bias<T>(p.head.film_bias, hidden + column, count, beta);
#pragma unroll
        for (int e = 0; e < kRun; ++e) v[e] = leak * (gamma[e] * y[e] + beta[e]);
        write_run(features(args, 2, rows) + at, v, count);
      }
    };
    for_each_run_of<C::kThreads>(rows.count, hidden, prepare);
  }

  // ---- head

  static __device__ __forceinline__ void run_head_tiles(const Arguments& args, T* shared,
                                                        RowRange rows) {
    // No memory holds the operands of 2^31 tiles, and a wide counter was one register too many.
#pragma unroll 1
    for (int item = blockIdx.x; item < int(args.head_end); item += gridDim.x) {
      if (item < args.out_weight_end) {
        out_weight_tile(args, shared, item, rows);
      } else if (item < args.branch_end) {
        branch_tile(args, shared, item - args.out_weight_end, rows);
      } else {
        out_bias_tile(args, shared, item - args.branch_end, rows);
      }
    }
  }

  static __device__ __forceinline__ void out_weight_tile(const Arguments& args, T* shared,
                                                         int64_t item, RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    const int64_t split = item / args.out_weight.count, index = item % args.out_weight.count;
    const int64_t m0 = args.out_weight.row<C>(index), n0 = args.out_weight.column<C>(index);
    const int64_t begin = split * args.plan.out_rows_per_split;
    const int64_t end =
        smaller(begin + args.plan.out_rows_per_split, args.plan.out_branches * rows.count);
    int first = 0;  // the branch in slot 0
    while (!args.plan.to_out_weight[first]) ++first;
    WeightTile tile;
    tile.clear();
    tile.accumulate(shared, gradient(args, first, rows),
                    {features(args, first, rows), args.plan.padded_hidden}, m0, p.head.classes, n0,
                    p.head.hidden, begin, end);
    const Accumulator scale = scale_of(args, 0);
    tile.for_each_run(
        shared, m0, p.head.classes, n0, p.head.hidden,
        [&](int m, int n, Accumulator(&v)[kRun], int count) {
          multiply_all(v, scale);
          if (args.plan.out_partials) {
            write_sum(out_weight_partial(args, split, m0 + m, n0 + n), v, count, rows);
          } else {
            write_sum(address<Output>(p.grad_out_weight, m0 + m, n0 + n), v, count, rows);
          }
        });
  }

  static __device__ __forceinline__ void branch_tile(const Arguments& args, T* shared,
                                                     int64_t index, RowRange rows) {
    const FilmHead& head = args.problem.head;
    int k = 0;  // the branch: the needed ones follow each other
    for (; !args.plan.need_branch[k] || index >= args.branch.count; ++k) {
      if (args.plan.need_branch[k]) index -= args.branch.count;
    }
    const int64_t m0 = args.branch.row<C>(index), n0 = args.branch.column<C>(index);
    if (m0 >= rows.count) return;  // the last chunk of rows may be short
    FeatureTile tile;
    tile.clear();
    tile.accumulate(shared, gradient(args, k, rows), operand<T>(head.out_weight), m0, rows.count,
                    n0, head.hidden, 0, head.classes);
    tile.for_each_run(shared, m0, rows.count, n0, head.hidden,
                      [&](int m, int n, Accumulator(&v)[kRun], int count) {
                        write_run(branch_at(args, k, m0 + m, n0 + n), v, count);
                      });
  }

  static __device__ __forceinline__ void out_bias_tile(const Arguments& args, T* shared,
                                                       int64_t item, RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    const int64_t across = ceil_div(p.head.classes, kColumnTile);
    const int64_t split = item / across, index = item % across;
    const int64_t begin = split * args.plan.rows_per_split;
    Planes::bias_tile(shared, rows, begin, smaller(begin + args.plan.rows_per_split, rows.count),
                      p.head.classes, index, scale_of(args, 0),
                      args.plan.partials ? bias_partial(args, split, 2 * p.head.hidden) : nullptr,
                      p.grad_out_bias,
                      [&](int64_t row, int64_t column, int count, Accumulator(&v)[kRun]) {
                        out_bias_gradient(args, row, column, count, rows, v);
                      });
  }
  /// What the gradient of the output's bias is summed from.
  static __device__ __forceinline__ void out_bias_gradient(const Arguments& args, int64_t row,
                                                           int64_t column, int count, RowRange rows,
                                                           Accumulator (&v)[kRun]) {
    const Accumulator leak = args.problem.leaks.head;
    out_gradient(args, 0, row, column, count, rows, v);
    if (leak == 0) return;
#pragma unroll 1
    for (int k = 1; k < 3; ++k) {
      Accumulator more[kRun];
      out_gradient(args, k, row, column, count, rows, more);
#pragma unroll
      for (int e = 0; e < kRun; ++e) v[e] += leak * more[e];
    }
  }
  /// The gradient of branch k's logits, 0 where none comes in.
  static __device__ __forceinline__ void out_gradient(const Arguments& args, int k, int64_t row,
                                                      int64_t column, int count, RowRange rows,
                                                      Accumulator (&v)[kRun]) {
    if constexpr (kStep) {
      read_run(gradient_copy(args, k, rows) + row * args.plan.padded_classes + column, count, v);
    } else {
      const ConstMatrix& g = incoming(args.problem, k);
      read_run<T>(g, row, column, g.data ? count : 0, v);
    }
  }

  // ---- combine

  static __device__ __forceinline__ void combine(const Arguments& args, RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    const Accumulator encoder = p.leaks.encoder, head = p.leaks.head;
    const int64_t pitch = args.plan.padded_hidden, hidden = p.head.hidden;
    const bool has_fused = args.plan.need_branch[0];
    const auto combine_run = [&](int64_t row, int64_t column, int count) {
      Accumulator fused[kRun], x_alone[kRun], y[kRun], v[kRun];
      read_branch(args, 0, row, column, count, fused);
      read_branch(args, 1, row, column, count, x_alone);
      read_target<T>(p.head, rows.begin + row, column, count, y);
      // where nothing flows there is no product: 0 * inf would poison the sum
      if (p.grad_film_weight.data) {
        T* to = for_parameters(args) + row * 2 * pitch + column;
#pragma unroll
        for (int e = 0; e < kRun; ++e) v[e] = has_fused ? fused[e] * y[e] : Accumulator(0);
        write_run(to, v, count);
#pragma unroll
        for (int e = 0; e < kRun; ++e) v[e] = head != 0 ? fused[e] + head * x_alone[e] : fused[e];
        write_run(to + pitch, v, count);
      }
      if (p.grad_condition.data) {
        T* to = for_encoder(args) + row * args.plan.encoder_pitch + column;
        if (args.plan.condition_leak) {
#pragma unroll
          for (int e = 0; e < kRun; ++e) v[e] = encoder * fused[e] * y[e];
          write_run(to, v, count);
#pragma unroll
          for (int e = 0; e < kRun; ++e) v[e] = encoder * fused[e] + x_alone[e];
          write_run(to + hidden, v, count);
        } else {
          write_run(to, x_alone, count);
        }
      }
      if (p.grad_target.data) grad_target_run(args, rows, row, column, count, fused);
    };
    for_each_run_of<C::kThreads>(rows.count, hidden, combine_run);
  }
  static __device__ __forceinline__ void grad_target_run(const Arguments& args, RowRange rows,
                                                         int64_t row, int64_t column, int count,
                                                         const Accumulator (&fused)[kRun]) {
    const FilmHeadBackward& p = args.problem;
    const Accumulator encoder = p.leaks.encoder;
    Accumulator v[kRun] = {};
    if (!is_absent(p.head.present[1], rows.begin + row)) {
      if (args.plan.need_branch[2]) {
        Accumulator bias_gamma[kRun];
        read_bias<T>(p.head.film_bias, column, count, bias_gamma);
        read_branch(args, 2, row, column, count, v);
#pragma unroll
        for (int e = 0; e < kRun; ++e) v[e] *= bias_gamma[e];
      }
      if (encoder != 0 && args.plan.need_branch[0]) {
        Accumulator gamma[kRun];
        read_run<Accumulator>(p.modulation, row, column, count, gamma);
#pragma unroll
        for (int e = 0; e < kRun; ++e) v[e] += encoder * gamma[e] * fused[e];
      }
      multiply_all(v, scale_of(args, 2));
    }
    write_run(address<Output>(p.grad_target, rows.begin + row, column), v, count);
  }

  // ---- film

  static __device__ __forceinline__ void run_film_tiles(const Arguments& args, T* shared,
                                                        RowRange rows) {
#pragma unroll 1
    for (int item = blockIdx.x; item < int(args.film_end); item += gridDim.x) {
      if (item < args.film_weight_end) {
        film_weight_tile(args, shared, item, rows);
      } else if (item < args.condition_end) {
        condition_tile(args, shared, item - args.film_weight_end, rows);
      } else {
        film_bias_tile(args, shared, item - args.condition_end, rows);
      }
    }
  }

  /// Half 0: the rows of W_f that make gamma; half 1: those that make beta.
  static __device__ __forceinline__ void film_weight_tile(const Arguments& args, T* shared,
                                                          int64_t item, RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    const int64_t index = item % args.film_weight.count;
    const int64_t half = item / args.film_weight.count % 2;
    const int64_t split = item / args.film_weight.count / 2;
    const int64_t begin = split * args.plan.rows_per_split;
    const int64_t end = smaller(begin + args.plan.rows_per_split, rows.count);
    const int64_t m0 = args.film_weight.row<C>(index), n0 = args.film_weight.column<C>(index);
    const Operand<T> gradient{for_parameters(args) + half * args.plan.padded_hidden,
                              2 * args.plan.padded_hidden};
    const Operand<T> condition = args.plan.masked.pitch > 0
                                     ? Operand<T>{masked_condition(args), args.plan.masked.pitch}
                                     : operand<T>(p.head.condition, rows.begin);
    WeightTile tile;
    tile.clear();
    tile.accumulate(shared, gradient, condition, m0, p.head.hidden, n0, p.head.condition_width,
                    begin, end);
    const Accumulator scale = scale_of(args, 0);
    tile.for_each_run(shared, m0, p.head.hidden, n0, p.head.condition_width,
                      [&](int m, int n, Accumulator(&v)[kRun], int count) {
                        const int64_t row = half * p.head.hidden + m0 + m;
                        multiply_all(v, scale);
                        if (args.plan.partials) {
                          write_sum(film_weight_partial(args, split, row, n0 + n), v, count, rows);
                        } else {
                          write_sum(address<Output>(p.grad_film_weight, row, n0 + n), v, count,
                                    rows);
                        }
                      });
  }

  static __device__ __forceinline__ void condition_tile(const Arguments& args, T* shared,
                                                        int64_t index, RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    const int64_t m0 = args.condition.row<C>(index), n0 = args.condition.column<C>(index);
    if (m0 >= rows.count) return;
    const int64_t first_half = args.plan.condition_leak ? 0 : 1;
    Operand<T> weight = operand<T>(p.head.film_weight);
    weight.data += first_half * p.head.hidden * weight.stride;
    FeatureTile tile;
    tile.clear();
    tile.accumulate(shared, {for_encoder(args), args.plan.encoder_pitch}, weight, m0, rows.count,
                    n0, p.head.condition_width, 0, (2 - first_half) * p.head.hidden);
    const Accumulator scale = scale_of(args, 1);
    tile.for_each_run(shared, m0, rows.count, n0, p.head.condition_width,
                      [&](int m, int n, Accumulator(&v)[kRun], int count) {
                        const int64_t row = rows.begin + m0 + m;
                        const bool absent = is_absent(p.head.present[0], row);
#pragma unroll
                        for (int e = 0; e < kRun; ++e) {
                          v[e] = absent ? Accumulator(0) : kStep ? v[e] * scale : v[e];
                        }
                        write_run(address<Output>(p.grad_condition, row, n0 + n), v, count);
                      });
  }

  static __device__ __forceinline__ void film_bias_tile(const Arguments& args, T* shared,
                                                        int64_t item, RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    const int64_t across = ceil_div(p.head.hidden, kColumnTile);
    const int64_t index = item % across, half = item / across % 2, split = item / across / 2;
    const int64_t begin = split * args.plan.rows_per_split;
    const int64_t first = half * p.head.hidden;
    Planes::bias_tile(shared, rows, begin, smaller(begin + args.plan.rows_per_split, rows.count),
                      p.head.hidden, index, scale_of(args, 0),
                      args.plan.partials ? bias_partial(args, split, first) : nullptr,
                      static_cast<Output*>(p.grad_film_bias) + first,
                      [&](int64_t row, int64_t column, int count, Accumulator(&v)[kRun]) {
                        film_bias_gradient(args, half, row, column, count, rows, v);
                      });
  }

  /// What the gradient of the film bias, gamma's or beta's half, is summed from.
  static __device__ __forceinline__ void film_bias_gradient(const Arguments& args, int64_t half,
                                                            int64_t row, int64_t column, int count,
                                                            RowRange rows, Accumulator (&v)[kRun]) {
    const FilmHeadBackward& p = args.problem;
    const Accumulator leak = p.leaks.head;
    const bool to_gamma = args.plan.need_branch[0] || (leak != 0 && args.plan.need_branch[2]);
    read_branch(args, 0, row, column, count, v);
    if (leak != 0) {
      add_branch(args, 2, row, column, count, leak, v);
      if (half == 1) add_branch(args, 1, row, column, count, leak, v);
    }
    if (half == 1) return;
    Accumulator y[kRun];
    read_target<T>(p.head, rows.begin + row, column, to_gamma ? count : 0, y);
#pragma unroll
    for (int e = 0; e < kRun; ++e) v[e] = to_gamma ? v[e] * y[e] : Accumulator(0);
  }

  // ---- add

  static __device__ __forceinline__ void add_row_splits(const Arguments& args, T* shared) {
    add_weight_splits(args);
    if (args.plan.partials) add_bias_splits(args, shared, 1);
  }
  static __device__ __forceinline__ void add_weight_splits(const Arguments& args) {
    const FilmHeadBackward& p = args.problem;
    const int64_t hidden = p.head.hidden, classes = p.head.classes;
    if (p.grad_out_weight.data && args.plan.out_partials) {
      const auto add = [&](int64_t row, int64_t column, int count) {
        Accumulator v[kRun] = {};
        add_splits(out_weight_partial(args, 0, row, column), args.plan.out_splits,
                   classes * args.plan.padded_hidden, count, v);
        write_run(address<Output>(p.grad_out_weight, row, column), v, count);
      };
      for_each_run_of<C::kThreads>(classes, hidden, add);
    }
    if (p.grad_film_weight.data && args.plan.partials) {
      const int64_t plane = 2 * hidden * round_up(p.head.condition_width, 8);
      const auto add = [&](int64_t row, int64_t column, int count) {
        Accumulator v[kRun] = {};
        add_splits(film_weight_partial(args, 0, row, column), args.plan.row_splits, plane, count,
                   v);
        write_run(address<Output>(p.grad_film_weight, row, column), v, count);
      };
      for_each_run_of<C::kThreads>(2 * hidden, p.head.condition_width, add);
    }
  }

  static __device__ __forceinline__ void add_bias_splits(const Arguments& args, T* shared,
                                                         Accumulator scale) {
    const FilmHeadBackward& p = args.problem;
    const int64_t film = 2 * p.head.hidden, pitch = film + p.head.classes;
    int64_t item = blockIdx.x;
    Planes::add_bias(shared, scale, p.grad_film_bias, bias_partial(args, 0, 0),
                     args.plan.bias_splits, pitch, film, item);
    Planes::add_bias(shared, scale, p.grad_out_bias, bias_partial(args, 0, film),
                     args.plan.bias_splits, pitch, p.head.classes, item);
  }

  /// Sums of the biases' gradients over this CTA's rows of a chunk, as its partial sums.
  static __device__ __forceinline__ void sum_biases(const Arguments& args, T* shared,
                                                    RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    const int64_t hidden = p.head.hidden;
#pragma unroll 1
    for (int half = 0; half < 2 && p.grad_film_bias; ++half) {
      Planes::sum_own_rows(shared, rows, hidden, bias_partial(args, blockIdx.x, half * hidden),
                           [&](int64_t row, int64_t column, int count, Accumulator(&v)[kRun]) {
                             film_bias_gradient(args, half, row, column, count, rows, v);
                           });
    }
    if (!p.grad_out_bias) return;
    Planes::sum_own_rows(shared, rows, p.head.classes, bias_partial(args, blockIdx.x, 2 * hidden),
                         [&](int64_t row, int64_t column, int count, Accumulator(&v)[kRun]) {
                           out_bias_gradient(args, row, column, count, rows, v);
                         });
  }
};

}  // namespace dgl_ext
