// Forward launch of the linear head (concat, sum): z = sum_i h_i W_i^T + b, z_i = h_i W_i^T + b_i.
#pragma once

#include "cuda/kernels/phases.cuh"

namespace dgl_ext {

struct LinearForwardArguments {
  LinearHeadForward problem;
  LinearForwardPlan plan;
  void* workspace;
};

template <class C>
struct LinearForward {
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;
  using Tile = GemmTile<C, Major::kDepth, Major::kDepth>;
  using Arguments = LinearForwardArguments;
  static constexpr int kSharedBytes = Tile::kSharedBytes;

  static __device__ __forceinline__ void run(const Arguments& args) {
    T* shared = shared_memory<C>();
    multiply<true>(args, shared, {0, args.problem.head.rows});
    if (args.plan.direct) return;
    grid_sync();
    write_logits(args, {0, args.problem.head.rows});
  }

  /// Direct: one item per output tile, all modalities one after the other. Otherwise one item per
  /// tile and split, the modality being the outermost split.
  template <bool kMayBeDirect>
  static __device__ __forceinline__ void multiply(const Arguments& args, T* shared, RowRange rows) {
    const LinearHead& head = args.problem.head;
    const LinearForwardPlan& plan = args.plan;
    const bool direct = kMayBeDirect && plan.direct;
#pragma unroll 1
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
      const int64_t split = item / plan.tiles.count, index = item % plan.tiles.count;
      int i = 0;
      int64_t first_split = 0;  // of modality i
      while (!direct && split - first_split >= plan.splits[i]) first_split += plan.splits[i++];
#pragma unroll 1
      do {
        const int64_t width = head.width[i];
        const int64_t begin = direct ? 0 : (split - first_split) * plan.split_depth;
        const int64_t end = direct ? width : smaller(begin + plan.split_depth, width);
        multiply_tile<Tile, C>(
            shared, plan.tiles, index, operand<T>(head.feature[i], rows.begin),
            operand<T>(head.weight[i]), rows.count, head.classes, begin, end, [&] {
              return [&](int64_t row, int64_t column, Accumulator(&v)[kRun], int count) {
                if (direct) {
                  store_direct(args, i, row, column, v, count);
                } else {
                  write_run(partial(args, split, row, column), v, count);
                }
              };
            });
        ++i;
      } while (direct && i < head.modalities);
    }
  }

  /// Partial sums of a row, which is counted from the first row of its chunk.
  static __device__ __forceinline__ Accumulator* partial(const Arguments& args, int64_t split,
                                                         int64_t row, int64_t column) {
    return static_cast<Accumulator*>(args.workspace) +
           (split * args.plan.plane_rows + row) * args.plan.padded_classes + column;
  }

  /// Bias of the fused logits, a run of it: concat has one, sum adds those of all branches.
  static __device__ __forceinline__ void read_fused_bias(const LinearHead& head, int64_t column,
                                                         int count, Accumulator (&v)[kRun]) {
    read_bias<T>(head.fused_bias, column, count, v);
    if (head.fused_bias) return;
#pragma unroll 1
    for (int i = 0; i < head.modalities; ++i) {
      Accumulator more[kRun];
      read_bias<T>(head.branch_bias[i], column, count, more);
#pragma unroll
      for (int e = 0; e < kRun; ++e) v[e] += more[e];
    }
  }

  /// Logits of all branches from the partial sums of every modality, each read once.
  static __device__ __forceinline__ void write_logits(const Arguments& args, RowRange rows) {
    const LinearHeadForward& p = args.problem;
    const int64_t plane = args.plan.plane_rows * args.plan.padded_classes;
    for_each_run_of<C::kThreads>(
        rows.count, p.head.classes, [&](int64_t row, int64_t column, int count) {
          Accumulator fused[kRun];
          read_fused_bias(p.head, column, count, fused);
          int64_t split = 0;
#pragma unroll 1
          for (int i = 0; i < p.head.modalities; ++i) {
            Accumulator sum[kRun] = {}, z[kRun];
            if (!is_absent(p.head.present[i], rows.begin + row)) {
              add_splits(partial(args, split, row, column), args.plan.splits[i], plane, count, sum);
            }
            read_bias<T>(p.head.branch_bias[i], column, count, z);
#pragma unroll
            for (int e = 0; e < kRun; ++e) {
              fused[e] += sum[e];
              z[e] += sum[e];
            }
            write_run(address<T>(p.unimodal[i], rows.begin + row, column), z, count);
            split += args.plan.splits[i];
          }
          write_run(address<T>(p.fused, rows.begin + row, column), fused, count);
        });
  }

 private:
  /// The fused sum is kept in the workspace between modalities. Every element is written and read
  /// by one thread, so no sync is needed; registers could not hold a second set of accumulators.
  static __device__ __forceinline__ void store_direct(const Arguments& args, int i, int64_t row,
                                                      int64_t column, Accumulator (&v)[kRun],
                                                      int count) {
    const LinearHeadForward& p = args.problem;
    Accumulator logits[kRun], sum[kRun] = {};
    Accumulator* kept = partial(args, 0, row, column);
    const bool last = i == p.head.modalities - 1;
    const bool absent = is_absent(p.head.present[i], row);
    read_bias<T>(p.head.branch_bias[i], column, count, logits);
    if (i > 0) read_run(kept, count, sum);
#pragma unroll
    for (int e = 0; e < kRun; ++e) {
      if (absent) v[e] = 0;
      logits[e] += v[e];
      sum[e] += v[e];
    }
    if (last) {
      Accumulator bias[kRun];
      read_fused_bias(p.head, column, count, bias);
#pragma unroll
      for (int e = 0; e < kRun; ++e) sum[e] += bias[e];
    }
    write_run(address<T>(p.unimodal[i], row, column), logits, count);
    if (last) {
      write_run(address<T>(p.fused, row, column), sum, count);
    } else {
      write_run(kept, sum, count);
    }
  }
};

}  // namespace dgl_ext
