// Backward launch of the linear head: one list of independent tiles for all gradients.
#pragma once

#include "phases.cuh"

namespace dgl_ext {

struct LinearBackwardArguments {
  LinearHeadBackward problem;
  LinearBackwardPlan plan;
  void* workspace;
  TileGrid weight[kMaxModalities]{}, feature[kMaxModalities]{};  ///< count 0: not wanted
  int64_t weight_tiles = 0, bias_tiles = 0;                      ///< of one row split
  /// Work items by kind: each kind ends where the next begins.
  int64_t weight_end = 0, feature_end = 0, bias_end = 0;
};

template <class C>
struct LinearBackward {
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;
  using WeightTile = GemmTile<C, Major::kOuter, Major::kOuter>;   // g^T h: k = rows
  using FeatureTile = GemmTile<C, Major::kDepth, Major::kOuter>;  // g W: k = classes
  using Arguments = LinearBackwardArguments;
  static constexpr int kSharedBytes = WeightTile::kSharedBytes > FeatureTile::kSharedBytes
                                          ? WeightTile::kSharedBytes
                                          : FeatureTile::kSharedBytes;

  static void count_tiles(Arguments& args) {
    const LinearHeadBackward& p = args.problem;
    int64_t feature_tiles = 0;
    int biases = p.grad_fused_bias != nullptr;
    args.weight_tiles = 0;
    for (int i = 0; i < p.head.modalities; ++i) {
      args.weight[i] = TileGrid::of<C>(p.head.classes, p.head.width[i]);
      args.feature[i] = TileGrid::of<C>(p.head.rows, p.head.width[i]);
      if (!p.grad_weight[i].data) args.weight[i].count = 0;
      if (!p.grad_feature[i].data) args.feature[i].count = 0;
      args.weight_tiles += args.weight[i].count;
      feature_tiles += args.feature[i].count;
      biases += p.grad_branch_bias[i] != nullptr;
    }
    args.bias_tiles = biases * ceil_div(p.head.classes, kColumnTile);
    args.weight_end = args.weight_tiles * args.plan.row_splits;
    args.feature_end = args.weight_end + feature_tiles;
    args.bias_end = args.feature_end + args.bias_tiles * args.plan.row_splits;
  }

  static __device__ __forceinline__ void run(const Arguments& args) {
    T* shared = reinterpret_cast<T*>(dynamic_shared_memory());
    if (args.plan.plane_count > 0) {
      make_planes(args);
      grid_sync();
    }
    run_tiles(args, shared);
    if (args.plan.row_splits > 1) {
      grid_sync();
      add_row_splits(args);
    }
  }

 private:
  /// Bias targets: 0 is the fused bias, i + 1 the bias of branch i.
  static __device__ __forceinline__ void* bias_target(const LinearHeadBackward& p, int target) {
    return target == 0 ? p.grad_fused_bias : p.grad_branch_bias[target - 1];
  }
  static __device__ __forceinline__ const ConstMatrix& gradient(const LinearHeadBackward& p,
                                                                int index) {
    return index == 0 ? p.grad_fused : p.grad_unimodal[index - 1];
  }
  static __device__ __forceinline__ T* plane(const Arguments& args, int index) {
    return static_cast<T*>(args.workspace) +
           index * args.problem.head.rows * args.plan.padded_classes;
  }
  static __device__ __forceinline__ Operand<T> source(const Arguments& args,
                                                      const GradientSource& s) {
    if (s.plane >= 0) return {plane(args, s.plane), args.plan.padded_classes};
    return operand<T>(gradient(args.problem, s.gradient));
  }

  static __device__ __forceinline__ void make_planes(const Arguments& args) {
    const LinearHeadBackward& p = args.problem;
#pragma unroll 1
    for (int i = 0; i < args.plan.plane_count; ++i) {
      const GradientPlane& job = args.plan.planes[i];
      T* out = plane(args, i);
      for_each_element<C>(p.head.rows, p.head.classes, [&](int64_t row, int64_t column) {
        Accumulator v = element<T>(gradient(p, job.first), row, column);
        if (job.second >= 0) {
          v += Accumulator(job.scale) * element<T>(gradient(p, job.second), row, column);
        }
        out[row * args.plan.padded_classes + column] = narrow<T>(v);
      });
    }
  }

  /// Weight tiles come first: their k, the number of rows, is usually the longest.
  static __device__ __forceinline__ void run_tiles(const Arguments& args, T* shared) {
#pragma unroll 1
    for (int64_t item = blockIdx.x; item < args.bias_end; item += gridDim.x) {
      if (item < args.weight_end) {
        weight_tile(args, shared, item % args.weight_tiles, item / args.weight_tiles);
      } else if (item < args.feature_end) {
        feature_tile(args, shared, item - args.weight_end);
      } else {
        const int64_t rest = item - args.feature_end;
        bias_tile(args, shared, rest % args.bias_tiles, rest / args.bias_tiles);
      }
    }
  }

  static __device__ __forceinline__ void weight_tile(const Arguments& args, T* shared,
                                                     int64_t index, int64_t split) {
    const LinearHeadBackward& p = args.problem;
    int i = 0;
    int64_t first_column = 0;  // of modality i in the partial sums
    for (; index >= args.weight[i].count; ++i) {
      index -= args.weight[i].count;
      first_column += round_up(p.head.width[i], WeightTile::kRun);
    }
    const int64_t m0 = args.weight[i].row<C>(index), n0 = args.weight[i].column<C>(index);
    const int64_t begin = split * args.plan.rows_per_split;
    const int64_t end = smaller(begin + args.plan.rows_per_split, p.head.rows);
    const Accumulator scale = args.plan.to_weight[i].scale;
    WeightTile tile;
    tile.clear();
    tile.accumulate(shared, source(args, args.plan.to_weight[i]), operand<T>(p.head.feature[i]), m0,
                    p.head.classes, n0, p.head.width[i], begin, end);
    tile.for_each_run(shared, m0, p.head.classes, n0, p.head.width[i],
                      [&](int m, int n, Accumulator(&v)[WeightTile::kRun], int count) {
#pragma unroll
                        for (int e = 0; e < WeightTile::kRun; ++e) v[e] *= scale;
                        if (args.plan.row_splits == 1) {
                          write_run(address<T>(p.grad_weight[i], m0 + m, n0 + n), v, count);
                        } else {
                          write_run(weight_partial(args, split, m0 + m, first_column + n0 + n), v,
                                    count);
                        }
                      });
  }

  static __device__ __forceinline__ void feature_tile(const Arguments& args, T* shared,
                                                      int64_t index) {
    const LinearHeadBackward& p = args.problem;
    int i = 0;
    for (; index >= args.feature[i].count; ++i) index -= args.feature[i].count;
    const int64_t m0 = args.feature[i].row<C>(index), n0 = args.feature[i].column<C>(index);
    const Accumulator scale = args.plan.to_feature[i].scale;
    FeatureTile tile;
    tile.clear();
    tile.accumulate(shared, source(args, args.plan.to_feature[i]), operand<T>(p.head.weight[i]), m0,
                    p.head.rows, n0, p.head.width[i], 0, p.head.classes);
    tile.for_each_run(shared, m0, p.head.rows, n0, p.head.width[i],
                      [&](int m, int n, Accumulator(&v)[FeatureTile::kRun], int count) {
#pragma unroll
                        for (int e = 0; e < FeatureTile::kRun; ++e) v[e] *= scale;
                        write_run(address<T>(p.grad_feature[i], m0 + m, n0 + n), v, count);
                      });
  }

  static __device__ __forceinline__ void bias_tile(const Arguments& args, T* shared, int64_t index,
                                                   int64_t split) {
    const LinearHeadBackward& p = args.problem;
    const int64_t across = ceil_div(p.head.classes, kColumnTile);
    int target = 0;
    for (;; ++target) {
      if (!bias_target(p, target)) continue;
      if (index < across) break;
      index -= across;
    }
    // the fused bias takes every branch's gradient, a branch's bias only its own
    const int first = target == 0 ? 1 : target;
    const int last = target == 0 ? p.head.modalities : target;
    const Accumulator leak = p.leaks.head;
    const int64_t begin = split * args.plan.rows_per_split;
    column_sums<C>(
        shared, begin, smaller(begin + args.plan.rows_per_split, p.head.rows), p.head.classes,
        index,
        [&](int64_t row, int64_t column) {
          Accumulator v = p.grad_fused.data ? element<T>(p.grad_fused, row, column) : 0;
          if (leak != 0) {
#pragma unroll 1
            for (int k = first; k <= last; ++k) {
              const ConstMatrix& g = gradient(p, k);
              if (g.data) v += leak * element<T>(g, row, column);
            }
          }
          return v;
        },
        [&](int64_t column, Accumulator sum) {
          if (args.plan.row_splits == 1) {
            static_cast<T*>(bias_target(p, target))[column] = narrow<T>(sum);
          } else {
            *bias_partial(args, split, target, column) = sum;
          }
        });
  }

  static __device__ __forceinline__ Accumulator* weight_partial(const Arguments& args,
                                                                int64_t split, int64_t row,
                                                                int64_t column) {
    return workspace_at<Accumulator>(args.workspace, args.plan.weight_partial_offset) +
           (split * args.problem.head.classes + row) * args.plan.weight_partial_columns + column;
  }
  static __device__ __forceinline__ Accumulator* bias_partial(const Arguments& args, int64_t split,
                                                              int target, int64_t column) {
    return workspace_at<Accumulator>(args.workspace, args.plan.bias_partial_offset) +
           (split * (args.problem.head.modalities + 1) + target) * args.problem.head.classes +
           column;
  }

  static __device__ __forceinline__ void add_row_splits(const Arguments& args) {
    const LinearHeadBackward& p = args.problem;
    const int64_t splits = args.plan.row_splits;
    const int64_t plane = p.head.classes * args.plan.weight_partial_columns;
    int64_t first_column = 0;
#pragma unroll 1
    for (int i = 0; i < p.head.modalities; ++i) {
      if (p.grad_weight[i].data) {
        for_each_element<C>(p.head.classes, p.head.width[i], [&](int64_t row, int64_t column) {
          const Accumulator* from = weight_partial(args, 0, row, first_column + column);
          *address<T>(p.grad_weight[i], row, column) = narrow<T>(sum_splits(from, splits, plane));
        });
      }
      first_column += round_up(p.head.width[i], WeightTile::kRun);
    }
    for_each_element<C>(p.head.modalities + 1, p.head.classes, [&](int64_t t, int64_t column) {
      if (void* target = bias_target(p, int(t))) {
        static_cast<T*>(target)[column] =
            narrow<T>(sum_splits(bias_partial(args, 0, int(t), column), splits,
                                 (p.head.modalities + 1) * p.head.classes));
      }
    });
  }
};

}  // namespace dgl_ext
