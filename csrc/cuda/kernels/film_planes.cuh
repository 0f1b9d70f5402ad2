// What the gradients of the FiLM head keep in the workspace, and where.
#pragma once

#include "cuda/kernels/film_forward.cuh"
#include "cuda/kernels/row_sums.cuh"

namespace dgl_ext {

struct FilmBackwardArguments {
  FilmHeadBackward problem;
  FilmBackwardPlan plan;
  void* workspace;
  TileGrid out_weight{}, branch{}, film_weight{}, condition{};
  /// Work items of the head phase and of the film phase, by kind: each kind ends where the next
  /// begins.
  int64_t out_weight_end = 0, branch_end = 0, head_end = 0;
  int64_t film_weight_end = 0, condition_end = 0, film_end = 0;
  int64_t totals_offset = 0;  ///< in a step: where the workspace has the branches' scales
};

/// kStep: gradients are those of a training step, whose rows may come in chunks.
template <class C, bool kStep>
struct FilmPlanes : RowSums<C, kStep> {
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;
  using Arguments = FilmBackwardArguments;

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
                                                                    int64_t split, int64_t row,
                                                                    int64_t column) {
    return workspace_at<Accumulator>(args.workspace, args.plan.out_weight_partial_offset) +
           (split * args.problem.head.classes + row) * args.plan.padded_hidden + column;
  }
  static __device__ __forceinline__ Accumulator* film_weight_partial(const Arguments& args,
                                                                     int64_t split, int64_t row,
                                                                     int64_t column) {
    const FilmHead& head = args.problem.head;
    return workspace_at<Accumulator>(args.workspace, args.plan.film_weight_partial_offset) +
           (split * 2 * head.hidden + row) * round_up(head.condition_width, 8) + column;
  }
  /// Columns: [gamma|beta] of the film bias, then the output's bias.
  static __device__ __forceinline__ Accumulator* bias_partial(const Arguments& args, int64_t split,
                                                              int64_t column) {
    const FilmHead& head = args.problem.head;
    return workspace_at<Accumulator>(args.workspace, args.plan.bias_partial_offset) +
           split * (2 * head.hidden + head.classes) + column;
  }
};

}  // namespace dgl_ext
