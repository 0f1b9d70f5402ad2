// Gradients of the FiLM head (formulas: FilmHeadBackward in problem.h), in phases of which the
// backward launch and the training step are made:
//   prepare   hidden features again from the saved modulation; aligned copies of the gradients
//   head      d[k] = g_k W_o for the branches k that are needed; grad_out_weight, grad_out_bias
//   combine   d[k] -> gradients of the modulation, for the parameters and for x; grad_target
//   film      grad_film_weight, grad_condition, grad_film_bias
// Where there are many rows, sums over rows go to the workspace in pieces; a fifth phase adds them.
// In a step the g_k are planes of residuals, scaled in the end, and rows may come in chunks.
#pragma once

#include "cuda/kernels/film_forward.cuh"
#include "cuda/kernels/row_sums.cuh"

namespace dgl_ext {

struct FilmBackwardArguments {
  FilmHeadBackward problem;
  FilmBackwardPlan plan;
  void* workspace;
  int64_t totals_offset = 0;  ///< in a step: where the workspace has the branches' scales
};

/// kStep: gradients are those of a training step, whose rows may come in chunks.
template <class C, bool kStep>
struct FilmGradients : RowSums<C, kStep> {
  using Sums = RowSums<C, kStep>;
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;
  using Output = typename Sums::Output;
  using Arguments = FilmBackwardArguments;

  // ---- what the workspace holds, and where

  static __device__ __forceinline__ const ConstMatrix& incoming(const FilmHeadBackward& p,
                                                                int branch) {
    return branch == 0 ? p.grad_fused : p.grad_unimodal[branch - 1];
  }
  static __device__ __forceinline__ T* gradient_copy(const Arguments& args, int branch,
                                                     RowRange rows) {
    return workspace_at<T>(args.workspace, args.plan.gradients_offset) +
           args.plan.slot[branch] * rows.count * args.plan.padded_classes;
  }
  static __device__ __forceinline__ Operand<T> gradient(const Arguments& args, int branch,
                                                        RowRange rows) {
    if (kStep || args.plan.copy_gradients) {
      return {gradient_copy(args, branch, rows), args.plan.padded_classes};
    }
    return operand<T>(incoming(args.problem, branch));
  }
  /// h, head_leak h_x, head_leak h_y: what grad_out_weight multiplies the gradients with.
  static __device__ __forceinline__ T* features(const Arguments& args, int branch, RowRange rows) {
    return workspace_at<T>(args.workspace, args.plan.features_offset) +
           args.plan.slot[branch] * rows.count * args.plan.padded_hidden;
  }
  static __device__ __forceinline__ Accumulator* branch_at(const Arguments& args, int branch,
                                                           int64_t row, int64_t column) {
    return workspace_at<Accumulator>(args.workspace, args.plan.branches_offset) +
           (branch * args.plan.plane_rows + row) * args.plan.padded_hidden + column;
  }
  /// A run of d[branch] where it was computed, else zeros: nothing arrives from that branch.
  static __device__ __forceinline__ void read_branch(const Arguments& args, int branch, int64_t row,
                                                     int64_t column, int count,
                                                     Accumulator (&v)[kRun]) {
    const Accumulator* from = branch_at(args, branch, row, column);
    read_run(from, args.plan.need_branch[branch] ? count : 0, v);
  }
  static __device__ __forceinline__ void add_branch(const Arguments& args, int branch, int64_t row,
                                                    int64_t column, int count, Accumulator factor,
                                                    Accumulator (&v)[kRun]) {
    Accumulator more[kRun];
    read_branch(args, branch, row, column, count, more);
#pragma unroll
    for (int e = 0; e < kRun; ++e) v[e] += factor * more[e];
  }
  /// Gradients of [gamma|beta] as the parameters receive them, in halves of padded_hidden, and as
  /// x receives them: [gamma|beta] without a gap, or beta alone when the leak is closed.
  static __device__ __forceinline__ T* for_parameters(const Arguments& args) {
    return workspace_at<T>(args.workspace, args.plan.parameters_offset);
  }
  static __device__ __forceinline__ T* for_encoder(const Arguments& args) {
    return workspace_at<T>(args.workspace, args.plan.encoder_offset);
  }

  static __device__ __forceinline__ T* masked_condition(const Arguments& args) {
    return workspace_at<T>(args.workspace, args.plan.masked.offset);
  }

  /// What a step multiplies sums of branch k's residuals with. Where a leak is open the planes are
  /// weighted, and all of them have the fused branch's scale.
  static __device__ __forceinline__ Accumulator scale_of(const Arguments& args, int k) {
    if constexpr (kStep) {
      if (args.plan.weighted) k = 0;
      return workspace_at<StepTotals>(args.workspace, args.totals_offset)[k].scale;
    } else {
      return 1;
    }
  }
  static __device__ __forceinline__ Accumulator* out_weight_partial(const Arguments& args,
                                                                    int64_t split) {
    return workspace_at<Accumulator>(args.workspace, args.plan.out_weight_partial_offset) +
           split * args.problem.head.classes * args.plan.padded_hidden;
  }
  static __device__ __forceinline__ Accumulator* film_weight_partial(const Arguments& args,
                                                                     int64_t row) {
    return workspace_at<Accumulator>(args.workspace, args.plan.film_weight_partial_offset) +
           row * args.plan.padded_condition;
  }
  /// Columns: [gamma|beta] of the film bias, then the output's bias.
  static __device__ __forceinline__ Accumulator* bias_partial(const Arguments& args, int64_t split,
                                                              int64_t column) {
    const FilmHead& head = args.problem.head;
    return workspace_at<Accumulator>(args.workspace, args.plan.bias_partial_offset) +
           split * (2 * head.hidden + head.classes) + column;
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
    for (int item = blockIdx.x; item < int(args.plan.head_end); item += gridDim.x) {
      if (item < args.plan.out_weight_end) {
        out_weight_tile(args, shared, item, rows);
      } else if (item < args.plan.branch_end) {
        branch_tile(args, shared, item - args.plan.out_weight_end, rows);
      } else {
        out_bias_tile(args, shared, item - args.plan.branch_end, rows);
      }
    }
  }

  static __device__ __forceinline__ void out_weight_tile(const Arguments& args, T* shared,
                                                         int64_t item, RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    const int64_t split = item / args.plan.out_weight.count;
    int first = 0;  // the branch in slot 0
    while (!args.plan.to_out_weight[first]) ++first;
    Sums::weight_tile(
        shared, args.plan.out_weight, item % args.plan.out_weight.count,
        gradient(args, first, rows), {features(args, first, rows), args.plan.padded_hidden},
        p.head.classes, p.head.hidden,
        Sums::split_of(split, args.plan.out_rows_per_split, args.plan.out_branches * rows.count),
        rows, [&] {
          return typename Sums::WeightTarget{
              static_cast<Output*>(p.grad_out_weight.data), p.grad_out_weight.stride,
              args.plan.out_partials ? out_weight_partial(args, split) : nullptr,
              args.plan.padded_hidden, scale_of(args, 0)};
        });
  }

  static __device__ __forceinline__ void branch_tile(const Arguments& args, T* shared,
                                                     int64_t index, RowRange rows) {
    const FilmHead& head = args.problem.head;
    const TileGrid& tiles = args.plan.branch;
    int k = 0;  // the branch: the needed ones follow each other
    for (; !args.plan.need_branch[k] || index >= tiles.count; ++k) {
      if (args.plan.need_branch[k]) index -= tiles.count;
    }
    multiply_tile<typename Sums::FeatureTile, C>(
        shared, tiles, index, gradient(args, k, rows), operand<T>(head.out_weight), rows.count,
        head.hidden, 0, head.classes, [&] {
          return [&](int64_t row, int64_t column, Accumulator(&v)[kRun], int count) {
            write_run(branch_at(args, k, row, column), v, count);
          };
        });
  }

  static __device__ __forceinline__ void out_bias_tile(const Arguments& args, T* shared,
                                                       int64_t item, RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    const int64_t across = ceil_div(p.head.classes, kColumnTile);
    const int64_t split = item / across, index = item % across;
    Sums::bias_tile(shared, rows, Sums::split_of(split, args.plan.rows_per_split, rows.count),
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
    const auto combine_run = [&](int64_t row, int64_t column, int count) {
      Accumulator fused[kRun], x_alone[kRun], y[kRun], v[kRun];
      read_branch(args, 0, row, column, count, fused);
      read_branch(args, 1, row, column, count, x_alone);
      read_target<T>(p.head, rows.begin + row, column, count, y);
      if (p.grad_film_weight.data) {
        T* to = for_parameters(args) + row * 2 * pitch + column;
#pragma unroll
        for (int e = 0; e < kRun; ++e) v[e] = fused[e] * y[e];
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
      Sums::multiply_all(v, scale_of(args, 2));
    }
    write_run(address<Output>(p.grad_target, rows.begin + row, column), v, count);
  }

  // ---- film

  static __device__ __forceinline__ void run_film_tiles(const Arguments& args, T* shared,
                                                        RowRange rows) {
#pragma unroll 1
    for (int item = blockIdx.x; item < int(args.plan.film_end); item += gridDim.x) {
      if (item < args.plan.film_weight_end) {
        film_weight_tile(args, shared, item, rows);
      } else if (item < args.plan.condition_end) {
        condition_tile(args, shared, item - args.plan.film_weight_end, rows);
      } else {
        film_bias_tile(args, shared, item - args.plan.condition_end, rows);
      }
    }
  }

  /// Half 0: the rows of W_f that make gamma; half 1: those that make beta.
  static __device__ __forceinline__ void film_weight_tile(const Arguments& args, T* shared,
                                                          int64_t item, RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    const TileGrid& tiles = args.plan.film_weight;
    const int64_t half = item / tiles.count % 2, split = item / tiles.count / 2;
    const Operand<T> gradient{for_parameters(args) + half * args.plan.padded_hidden,
                              2 * args.plan.padded_hidden};
    const Operand<T> condition = args.plan.masked.pitch > 0
                                     ? Operand<T>{masked_condition(args), args.plan.masked.pitch}
                                     : operand<T>(p.head.condition, rows.begin);
    RowRange summed = Sums::split_of(split, args.plan.rows_per_split, rows.count);
    // where nothing flows there is no product: 0 * inf would poison the sum
    if (half == 0 && !args.plan.need_branch[0]) summed.count = 0;
    Sums::weight_tile(
        shared, tiles, item % tiles.count, gradient, condition, p.head.hidden,
        p.head.condition_width, summed, rows, [&] {
          const int64_t first_row = half * p.head.hidden;
          return typename Sums::WeightTarget{
              address<Output>(p.grad_film_weight, first_row, 0), p.grad_film_weight.stride,
              args.plan.partials ? film_weight_partial(args, split * 2 * p.head.hidden + first_row)
                                 : nullptr,
              args.plan.padded_condition, scale_of(args, 0)};
        });
  }

  static __device__ __forceinline__ void condition_tile(const Arguments& args, T* shared,
                                                        int64_t index, RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    const int64_t first_half = args.plan.condition_leak ? 0 : 1;
    Operand<T> weight = operand<T>(p.head.film_weight);
    weight.data += first_half * p.head.hidden * weight.stride;
    Sums::feature_tile(
        shared, args.plan.condition, index, {for_encoder(args), args.plan.encoder_pitch}, weight,
        (2 - first_half) * p.head.hidden, p.head.condition_width, rows, [&] {
          return
              typename Sums::FeatureTarget{p.grad_condition, p.head.present[0], scale_of(args, 1)};
        });
  }

  static __device__ __forceinline__ void film_bias_tile(const Arguments& args, T* shared,
                                                        int64_t item, RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    const int64_t across = ceil_div(p.head.hidden, kColumnTile);
    const int64_t index = item % across, half = item / across % 2, split = item / across / 2;
    const int64_t first = half * p.head.hidden;
    Sums::bias_tile(shared, rows, Sums::split_of(split, args.plan.rows_per_split, rows.count),
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
      Sums::add_weight(p.grad_out_weight, classes, hidden, out_weight_partial(args, 0),
                       args.plan.out_splits, classes * args.plan.padded_hidden,
                       args.plan.padded_hidden);
    }
    if (p.grad_film_weight.data && args.plan.partials) {
      const int64_t pitch = args.plan.padded_condition;
      Sums::add_weight(p.grad_film_weight, 2 * hidden, p.head.condition_width,
                       film_weight_partial(args, 0), args.plan.row_splits, 2 * hidden * pitch,
                       pitch);
    }
  }

  static __device__ __forceinline__ void add_bias_splits(const Arguments& args, T* shared,
                                                         Accumulator scale) {
    const FilmHeadBackward& p = args.problem;
    const int64_t film = 2 * p.head.hidden, pitch = film + p.head.classes;
    int64_t item = blockIdx.x;
    Sums::add_bias(shared, scale, p.grad_film_bias, bias_partial(args, 0, 0), args.plan.bias_splits,
                   pitch, film, item);
    Sums::add_bias(shared, scale, p.grad_out_bias, bias_partial(args, 0, film),
                   args.plan.bias_splits, pitch, p.head.classes, item);
  }

  /// The end of a library launch: sums that the workspace has, and zeros for absent rows.
  static __device__ __forceinline__ void finish(const Arguments& args, T* shared) {
    const FilmHeadBackward& p = args.problem;
    add_weight_splits(args);
    add_bias_splits(args, shared, scale_of(args, 0));
    clear_absent<C, Output>(p.grad_condition, p.head.rows, p.head.condition_width,
                            p.head.present[0]);
  }

  /// Sums of the biases' gradients over this CTA's rows of a chunk, as its partial sums.
  static __device__ __forceinline__ void sum_biases(const Arguments& args, T* shared,
                                                    RowRange rows) {
    const FilmHeadBackward& p = args.problem;
    const int64_t hidden = p.head.hidden;
#pragma unroll 1
    for (int half = 0; half < 2 && p.grad_film_bias; ++half) {
      Sums::sum_own_rows(shared, rows, hidden, bias_partial(args, blockIdx.x, half * hidden),
                         [&](int64_t row, int64_t column, int count, Accumulator(&v)[kRun]) {
                           film_bias_gradient(args, half, row, column, count, rows, v);
                         });
    }
    if (!p.grad_out_bias) return;
    Sums::sum_own_rows(shared, rows, p.head.classes, bias_partial(args, blockIdx.x, 2 * hidden),
                       [&](int64_t row, int64_t column, int count, Accumulator(&v)[kRun]) {
                         out_bias_gradient(args, row, column, count, rows, v);
                       });
  }
};

}  // namespace dgl_ext
