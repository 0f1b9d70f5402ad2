// Training step of the FiLM head in one launch. For every chunk of rows:
//   film       partial sums of the modulation; beside the first, the rows that count
//   modulate   hidden features of the three branches
//   head       partial logits
//   rows       logits, losses, hits, residual planes
// and the phases of film_gradients.cuh; weights and biases add up over the chunks.
#pragma once

#include "cross_entropy.cuh"
#include "film_forward.cuh"
#include "film_gradients.cuh"

namespace dgl_ext {

struct FilmStepArguments {
  FilmForwardArguments forward;
  FilmBackwardArguments backward;
  CrossEntropy loss;
  StepPlan plan;
};

template <class C>
struct FilmStep {
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;
  using Forward = FilmForward<C>;
  using Gradients = FilmGradients<C, true>;
  using Losses = StepLosses<C>;
  using Arguments = FilmStepArguments;
  static constexpr int kSharedBytes = Forward::kSharedBytes > Gradients::kSharedBytes
                                          ? Forward::kSharedBytes
                                          : Gradients::kSharedBytes;

  static void count_tiles(Arguments& args) {
    Forward::count_tiles(args.forward);
    Gradients::count_tiles(args.backward);
  }

  static __device__ __forceinline__ void run(const Arguments& args) {
    T* shared = reinterpret_cast<T*>(dynamic_shared_memory());
    const FilmHead& head = args.forward.problem.head;
    const StepContext step{args.loss, args.plan,    head.present,
                           head.rows, head.classes, args.forward.workspace};
    Losses::count(step, shared);
#pragma unroll 1
    for (int chunk = 0; chunk < args.plan.chunks; ++chunk) {
      RowRange rows = chunk_of(args, chunk);
      Forward::multiply_film(args.forward, shared, rows);
      grid_sync();
      Forward::modulate(args.forward, rows);
      grid_sync();
      Forward::template multiply_head<true>(args.forward, shared, rows);
      grid_sync();
      Losses::run_rows(step, shared, rows, [&](int k, int64_t row, int64_t column) {
        return logit(args.forward, k, row, column);
      });
      if (args.plan.gradients) Gradients::prepare_features(args.backward, rows);
      grid_sync();
      if (args.plan.gradients) {
        hide_origin(rows.begin);
        hide_origin(rows.count);
        Gradients::run_head_tiles(args.backward, shared, rows);
        grid_sync();
        Gradients::combine(args.backward, rows);
        grid_sync();
        Gradients::run_film_tiles(args.backward, shared, rows);
      }
    }
    if (blockIdx.x == args.backward.film_end % gridDim.x) Losses::finish(step, shared);
    if (args.backward.plan.partials || args.backward.plan.out_partials) {
      grid_sync();
      Gradients::add_row_splits(args.backward);
    }
  }

 private:
  static __device__ __forceinline__ RowRange chunk_of(const Arguments& args, int chunk) {
    const int64_t begin = chunk * args.plan.chunk_rows;
    return {begin, smaller(args.plan.chunk_rows, args.forward.problem.head.rows - begin)};
  }

  static __device__ __forceinline__ Accumulator logit(const FilmForwardArguments& args, int k,
                                                      int64_t row, int64_t column) {
    const int64_t plane = 3 * args.plan.plane_rows * args.plan.padded_classes;
    return bias_at<T>(args.problem.head.out_bias, column) +
           sum_splits(Forward::head_partial(args, 0, k, row, column), args.plan.head_splits, plane);
  }
};

}  // namespace dgl_ext
