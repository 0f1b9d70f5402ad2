// Training step of the FiLM head in one launch. For every chunk of rows:
//   film       partial sums of the modulation; beside the first, the rows that count
//   modulate   hidden features of the three branches
//   head       partial logits
//   rows       logits, losses, correct rows, residual planes
// and the phases of film_gradients.cuh; weights and biases add up over the chunks.
#pragma once

#include "cuda/kernels/cross_entropy.cuh"
#include "cuda/kernels/film_forward.cuh"
#include "cuda/kernels/film_gradients.cuh"

namespace dgl_ext {

struct FilmStepArguments {
  FilmForwardArguments forward;
  FilmBackwardArguments backward;
  StepContext step;
};

/// Where rows.cuh finds the logits of FiLM: a part per branch.
template <class C>
struct FilmLogits {
  using Accumulator = typename C::Accumulator;
  static constexpr bool kAdds = false;
  const FilmForwardArguments& args;

  __device__ int parts() const { return 3; }
  __device__ int64_t splits(int) const { return args.plan.head_splits; }
  __device__ int64_t part_step(int) const {
    return args.plan.plane_rows * args.plan.padded_classes;
  }
  __device__ int64_t split_step() const { return 3 * part_step(0); }
  __device__ const Accumulator* at(int64_t row, int64_t column) const {
    return FilmForward<C>::head_partial(args, 0, 0, row, column);
  }
  __device__ void read_bias_of(int, int64_t column, int count, Accumulator (&v)[kRun]) const {
    read_bias<typename C::T>(args.problem.head.out_bias, column, count, v);
  }
};

template <class C>
struct FilmStep {
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;
  using Forward = FilmForward<C>;
  using Gradients = FilmGradients<C, true>;
  using Losses = StepLosses<C>;
  using Arguments = FilmStepArguments;
  static constexpr int kSharedBytes =
      greatest(Forward::kSharedBytes, Gradients::kSharedBytes, Losses::kSharedBytes);

  static __device__ __forceinline__ void run(const Arguments& args) {
    T* shared = shared_memory<C>();
    const StepContext& step = args.step;
    Losses::count(step, shared);
#pragma unroll 1
    for (int chunk = 0; chunk < step.plan.chunks; ++chunk) {
      RowRange rows = step.chunk(chunk);
      Forward::multiply_film(args.forward, shared, rows);
      grid_sync();
      Forward::modulate(args.forward, rows);
      grid_sync();
      Forward::template multiply_head<true>(args.forward, shared, rows);
      grid_sync();
      hide_origin(rows.begin);
      hide_origin(rows.count);
      Losses::run_rows(step, shared, rows, FilmLogits<C>{args.forward});
      if (step.plan.gradients) Gradients::prepare_features(args.backward, rows);
      grid_sync();
      if (step.plan.gradients) {
        Gradients::run_head_tiles(args.backward, shared, rows);
        grid_sync();
        Gradients::combine(args.backward, rows);
        grid_sync();
        Gradients::run_film_tiles(args.backward, shared, rows);
      }
    }
    if (blockIdx.x == args.backward.plan.film_end % gridDim.x) Losses::finish(step, shared);
    if (args.backward.plan.partials || args.backward.plan.out_partials) {
      grid_sync();
      Gradients::add_row_splits(args.backward, shared);
    }
  }
};

}  // namespace dgl_ext
