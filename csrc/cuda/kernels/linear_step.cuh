// Training step of the linear head (concat, sum) in one launch. For every chunk of rows:
//   multiply   partial logits; beside the first, the rows that count
//   rows       logits, losses, correct rows, residual planes
//   gradients  tiles of all gradients; weights and biases add up over the chunks
// and in the end the losses, and the split sums of the weights where there are any.
#pragma once

#include "cuda/kernels/cross_entropy.cuh"
#include "cuda/kernels/linear_forward.cuh"
#include "cuda/kernels/linear_gradients.cuh"

namespace dgl_ext {

struct LinearStepArguments {
  LinearForwardArguments forward;
  LinearBackwardArguments backward;
  StepContext step;
};

/// Where rows.cuh finds the logits of concat and sum: a part per modality.
template <class C>
struct LinearLogits {
  using Accumulator = typename C::Accumulator;
  static constexpr bool kAdds = true;
  const LinearForwardArguments& args;

  __device__ int parts() const { return args.problem.head.modalities; }
  __device__ int64_t splits(int i) const { return args.plan.splits[i]; }
  __device__ int64_t split_step() const { return args.plan.plane_rows * args.plan.padded_classes; }
  __device__ int64_t part_step(int i) const { return splits(i) * split_step(); }
  __device__ const Accumulator* at(int64_t row, int64_t column) const {
    return LinearForward<C>::partial(args, 0, row, column);
  }
  __device__ void read_fused_bias(int64_t column, int count, Accumulator (&v)[kRun]) const {
    LinearForward<C>::read_fused_bias(args.problem.head, column, count, v);
  }
  __device__ void read_bias_of(int i, int64_t column, int count, Accumulator (&v)[kRun]) const {
    read_bias<typename C::T>(args.problem.head.branch_bias[i], column, count, v);
  }
};

template <class C>
struct LinearStep {
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;
  using Forward = LinearForward<C>;
  using Gradients = LinearGradients<C, true>;
  using Losses = StepLosses<C>;
  using Arguments = LinearStepArguments;
  static constexpr int kSharedBytes =
      greatest(Forward::kSharedBytes, Gradients::kSharedBytes, Losses::kSharedBytes);

  static __device__ __forceinline__ void run(const Arguments& args) {
    T* shared = shared_memory<C>();
    const StepContext& step = args.step;
    Losses::count(step, shared);
#pragma unroll 1
    for (int chunk = 0; chunk < step.plan.chunks; ++chunk) {
      RowRange rows = step.chunk(chunk);
      Forward::template multiply<false>(args.forward, shared, rows);
      grid_sync();
      hide_origin(rows.begin);
      hide_origin(rows.count);
      Losses::run_rows(step, shared, rows, LinearLogits<C>{args.forward});
      Gradients::copy_masked(args.backward, rows);
      grid_sync();
      if (step.plan.gradients) Gradients::run_tiles(args.backward, shared, rows);
    }
    if (blockIdx.x == args.backward.plan.bias_end % gridDim.x) Losses::finish(step, shared);
    if (args.backward.plan.partials) {
      grid_sync();
      Gradients::add_row_splits(args.backward, shared);
    }
  }
};

}  // namespace dgl_ext
