// Gradients of the linear head from planes of logit gradients or of residuals: one list of
// independent tiles for all of them. The backward launch and the training step are made of it.
#pragma once

#include "cuda/kernels/row_sums.cuh"

namespace dgl_ext {

struct LinearBackwardArguments {
  LinearHeadBackward problem;
  LinearBackwardPlan plan;
  void* workspace;
  int64_t totals_offset = 0;  ///< in a step: where the workspace has the branches' scales
};

/// kStep: gradients are those of a training step, whose rows may come in chunks.
template <class C, bool kStep>
struct LinearGradients : RowSums<C, kStep> {
  using Sums = RowSums<C, kStep>;
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;
  using Output = typename Sums::Output;
  using Arguments = LinearBackwardArguments;

  /// Bias targets: 0 is the fused bias, i + 1 the bias of branch i.
  static __device__ __forceinline__ void* bias_target(const LinearHeadBackward& p, int target) {
    return target == 0 ? p.grad_fused_bias : p.grad_branch_bias[target - 1];
  }
  static __device__ __forceinline__ const ConstMatrix& gradient(const LinearHeadBackward& p,
                                                                int index) {
    return index == 0 ? p.grad_fused : p.grad_unimodal[index - 1];
  }
  static __device__ __forceinline__ T* plane(const Arguments& args, int index, RowRange rows) {
    return workspace_at<T>(args.workspace, args.plan.plane_offset) +
           index * rows.count * args.plan.padded_classes;
  }
  static __device__ __forceinline__ Operand<T> source(const Arguments& args,
                                                      const GradientSource& s, RowRange rows) {
    if (kStep || s.plane >= 0) return {plane(args, s.plane, rows), args.plan.padded_classes};
    return operand<T>(gradient(args.problem, s.gradient));
  }
  static __device__ __forceinline__ Accumulator scale_of(const Arguments& args,
                                                         const GradientSource& s) {
    if constexpr (kStep) {
      return workspace_at<StepTotals>(args.workspace, args.totals_offset)[s.gradient].scale;
    } else {
      return s.scale;
    }
  }
  /// What the weight gradient of modality i multiplies the residuals with.
  static __device__ __forceinline__ Operand<T> feature(const Arguments& args, int i,
                                                       RowRange rows) {
    const MaskedCopy& masked = args.plan.masked[i];
    if (masked.pitch > 0) return {masked_copy(args, i), masked.pitch};
    return operand<T>(args.problem.head.feature[i], rows.begin);
  }
  static __device__ __forceinline__ T* masked_copy(const Arguments& args, int i) {
    return workspace_at<T>(args.workspace, args.plan.masked[i].offset);
  }

  /// Copies features whose rows may be absent, with zeros where they are.
  static __device__ __forceinline__ void copy_masked(const Arguments& args, RowRange rows) {
    const LinearHead& head = args.problem.head;
#pragma unroll 1
    for (int i = 0; i < head.modalities; ++i) {
      const int64_t pitch = args.plan.masked[i].pitch;
      if (pitch == 0) continue;
      copy_rows<C>(operand<T>(head.feature[i], rows.begin), masked_copy(args, i), pitch, rows,
                   head.width[i], head.present[i]);
    }
  }

  /// Weight tiles come first: their k, the number of rows, is usually the longest.
  static __device__ __forceinline__ void run_tiles(const Arguments& args, T* shared,
                                                   RowRange rows) {
    const LinearBackwardPlan& plan = args.plan;
#pragma unroll 1
    for (int64_t item = blockIdx.x; item < plan.bias_end; item += gridDim.x) {
      if (item < plan.weight_end) {
        weight_tile(args, shared, item % plan.weight_tiles, item / plan.weight_tiles, rows);
      } else if (item < plan.feature_end) {
        feature_tile(args, shared, item - plan.weight_end, rows);
      } else {
        const int64_t rest = item - plan.feature_end;
        bias_tile(args, shared, rest % plan.bias_tiles, rest / plan.bias_tiles, rows);
      }
    }
  }

  static __device__ __forceinline__ void weight_tile(const Arguments& args, T* shared,
                                                     int64_t index, int64_t split, RowRange rows) {
    const LinearHeadBackward& p = args.problem;
    const LinearBackwardPlan& plan = args.plan;
    int i = 0;
    int64_t first_column = 0;  // of modality i in the partial sums
    for (; index >= plan.weight[i].count; ++i) {
      index -= plan.weight[i].count;
      first_column += round_up(p.head.width[i], kRun);
    }
    Sums::weight_tile(shared, plan.weight[i], index, source(args, plan.to_weight[i], rows),
                      feature(args, i, rows), p.head.classes, p.head.width[i],
                      Sums::split_of(split, plan.rows_per_split, rows.count), rows, [&] {
                        const Matrix& output = p.grad_weight[i];
                        return typename Sums::WeightTarget{
                            static_cast<Output*>(output.data), output.stride,
                            plan.partials ? weight_partial(args, split, first_column) : nullptr,
                            plan.weight_partial_columns, scale_of(args, plan.to_weight[i])};
                      });
  }

  static __device__ __forceinline__ void feature_tile(const Arguments& args, T* shared,
                                                      int64_t index, RowRange rows) {
    const LinearHeadBackward& p = args.problem;
    const LinearBackwardPlan& plan = args.plan;
    int i = 0;
    for (; index >= plan.feature[i].count; ++i) index -= plan.feature[i].count;
    Sums::feature_tile(shared, plan.feature[i], index, source(args, plan.to_feature[i], rows),
                       operand<T>(p.head.weight[i]), p.head.classes, p.head.width[i], rows, [&] {
                         return typename Sums::FeatureTarget{p.grad_feature[i], p.head.present[i],
                                                             scale_of(args, plan.to_feature[i])};
                       });
  }

  static __device__ __forceinline__ void bias_tile(const Arguments& args, T* shared, int64_t index,
                                                   int64_t split, RowRange rows) {
    const LinearHeadBackward& p = args.problem;
    const int64_t across = ceil_div(p.head.classes, kColumnTile);
    int target = 0;
    for (;; ++target) {
      if (!bias_target(p, target)) continue;
      if (index < across) break;
      index -= across;
    }
    Sums::bias_tile(shared, rows, Sums::split_of(split, args.plan.rows_per_split, rows.count),
                    p.head.classes, index, scale_of(args, GradientSource{0, 0, 1}),
                    args.plan.partials ? bias_partial(args, split, target) : nullptr,
                    bias_target(p, target),
                    [&](int64_t row, int64_t column, int count, Accumulator(&v)[kRun]) {
                      bias_gradient(args, target, row, column, count, rows, v);
                    });
  }

  /// What the gradient of a bias is summed from: a run of one row.
  static __device__ __forceinline__ void bias_gradient(const Arguments& args, int target,
                                                       int64_t row, int64_t column, int count,
                                                       RowRange rows, Accumulator (&v)[kRun]) {
    if constexpr (kStep) {
      const T* residuals = plane(args, args.plan.bias_plane[target], rows);
      read_run(residuals + row * args.plan.padded_classes + column, count, v);
    } else {
      const LinearHeadBackward& p = args.problem;
      const Accumulator leak = p.leaks.head;
      read_run<T>(p.grad_fused, row, column, p.grad_fused.data ? count : 0, v);
      if (leak == 0) return;
      // the fused bias takes every branch's gradient, a branch's bias only its own
      const int last = target == 0 ? p.head.modalities : target;
#pragma unroll 1
      for (int k = target == 0 ? 1 : target; k <= last; ++k) {
        if (gradient(p, k).data) add_run<T>(gradient(p, k), row, column, count, leak, v);
      }
    }
  }

  /// Of the modality that begins at that column.
  static __device__ __forceinline__ Accumulator* weight_partial(const Arguments& args,
                                                                int64_t split, int64_t column) {
    return workspace_at<Accumulator>(args.workspace, args.plan.weight_partial_offset) +
           split * args.problem.head.classes * args.plan.weight_partial_columns + column;
  }
  static __device__ __forceinline__ Accumulator* bias_partial(const Arguments& args, int64_t split,
                                                              int target) {
    return workspace_at<Accumulator>(args.workspace, args.plan.bias_partial_offset) +
           (split * (args.problem.head.modalities + 1) + target) * args.problem.head.classes;
  }

  static __device__ __forceinline__ void add_row_splits(const Arguments& args, T* shared) {
    add_weight_splits(args);
    add_bias_splits(args, shared, 1);
  }
  static __device__ __forceinline__ void add_weight_splits(const Arguments& args) {
    const LinearHeadBackward& p = args.problem;
    const int64_t pitch = args.plan.weight_partial_columns;
    int64_t first_column = 0;
#pragma unroll 1
    for (int i = 0; i < p.head.modalities; ++i) {
      if (p.grad_weight[i].data) {
        Sums::add_weight(p.grad_weight[i], p.head.classes, p.head.width[i],
                         weight_partial(args, 0, first_column), args.plan.row_splits,
                         p.head.classes * pitch, pitch);
      }
      first_column += round_up(p.head.width[i], kRun);
    }
  }

  /// The end of a library launch: sums that the workspace has, and zeros for absent rows.
  static __device__ __forceinline__ void finish(const Arguments& args, T* shared) {
    const LinearHeadBackward& p = args.problem;
    if (args.plan.partials) add_weight_splits(args);
    add_bias_splits(args, shared, scale_of(args, GradientSource{0, 0, 1}));
#pragma unroll 1
    for (int i = 0; i < p.head.modalities; ++i) {
      clear_absent<C, Output>(p.grad_feature[i], p.head.rows, p.head.width[i], p.head.present[i]);
    }
  }

  /// Sums of the biases' gradients over a chunk's rows of this CTA, as its partial sums.
  static __device__ __forceinline__ void sum_biases(const Arguments& args, T* shared,
                                                    RowRange rows) {
    const LinearHeadBackward& p = args.problem;
#pragma unroll 1
    for (int target = 0; target <= p.head.modalities; ++target) {
      if (!bias_target(p, target)) continue;
      Sums::sum_own_rows(shared, rows, p.head.classes, bias_partial(args, blockIdx.x, target),
                         [&](int64_t row, int64_t column, int count, Accumulator(&v)[kRun]) {
                           bias_gradient(args, target, row, column, count, rows, v);
                         });
    }
  }
  static __device__ __forceinline__ void add_bias_splits(const Arguments& args, T* shared,
                                                         Accumulator scale) {
    const LinearHeadBackward& p = args.problem;
    int64_t item = blockIdx.x;
#pragma unroll 1
    for (int target = 0; target <= p.head.modalities; ++target) {
      Sums::add_bias(shared, scale, bias_target(p, target), bias_partial(args, 0, target),
                     args.plan.bias_splits, (p.head.modalities + 1) * p.head.classes,
                     p.head.classes, item);
    }
  }
};

}  // namespace dgl_ext
