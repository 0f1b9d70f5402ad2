// Training step of the linear head (concat, sum) in one launch. For every chunk of rows:
//   multiply   partial logits; beside the first, the rows that count
//   rows       logits, losses, hits, residual planes
//   gradients  tiles of all gradients; weights and biases add up over the chunks
// and in the end the losses, and the split sums of the weights where there are any.
#pragma once

#include "cross_entropy.cuh"
#include "linear_forward.cuh"
#include "linear_gradients.cuh"

namespace dgl_ext {

struct LinearStepArguments {
  LinearForwardArguments forward;
  LinearBackwardArguments backward;
  CrossEntropy loss;
  StepPlan plan;
};

template <class C>
struct LinearStep {
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;
  using Forward = LinearForward<C>;
  using Gradients = LinearGradients<C, true>;
  using Losses = StepLosses<C>;
  using Arguments = LinearStepArguments;
  static constexpr int kSharedBytes = Forward::kSharedBytes > Gradients::kSharedBytes
                                          ? Forward::kSharedBytes
                                          : Gradients::kSharedBytes;

  static void count_tiles(Arguments& args) {
    Forward::count_tiles(args.forward);
    Gradients::count_tiles(args.backward);
  }

  static __device__ __forceinline__ void run(const Arguments& args) {
    T* shared = reinterpret_cast<T*>(dynamic_shared_memory());
    const LinearHead& head = args.forward.problem.head;
    const StepContext step{args.loss, args.plan,    head.present,
                           head.rows, head.classes, args.forward.workspace};
    Losses::count(step, shared);
#pragma unroll 1
    for (int chunk = 0; chunk < args.plan.chunks; ++chunk) {
      const RowRange rows = chunk_of(args, chunk);
      Forward::template multiply<false>(args.forward, shared, rows);
      grid_sync();
      Losses::run_rows(step, shared, rows, [&](int k, int64_t row, int64_t column) {
        return logit(args.forward, rows, k, row, column);
      });
      Gradients::copy_masked(args.backward, rows);
      grid_sync();
      if (args.plan.gradients) Gradients::run_tiles(args.backward, shared, rows);
    }
    if (blockIdx.x == args.backward.bias_end % gridDim.x) Losses::finish(step, shared);
    if (args.backward.plan.partials) {
      grid_sync();
      Gradients::add_row_splits(args.backward);
    }
  }

 private:
  static __device__ __forceinline__ RowRange chunk_of(const Arguments& args, int chunk) {
    const int64_t begin = chunk * args.plan.chunk_rows;
    return {begin, smaller(args.plan.chunk_rows, args.forward.problem.head.rows - begin)};
  }

  static __device__ __forceinline__ Accumulator logit(const LinearForwardArguments& args,
                                                      RowRange rows, int k, int64_t row,
                                                      int64_t column) {
    const LinearHeadForward& p = args.problem;
    const int64_t plane = args.plan.plane_rows * args.plan.padded_classes;
    Accumulator z = k == 0 ? Forward::fused_bias(p, column)
                           : Accumulator(bias_at<T>(p.branch_bias[k - 1], column));
    int64_t split = 0;
#pragma unroll 1
    for (int i = 0; i < p.head.modalities; ++i) {
      const int64_t count = args.plan.splits[i];
      const bool takes = k == 0 ? !is_absent(p.head.present[i], rows.begin + row) : k == i + 1;
      if (takes) z += sum_splits(Forward::partial(args, split, row, column), count, plane);
      split += count;
    }
    return z;
  }
};

}  // namespace dgl_ext
