// Backward launch of the FiLM head; the phases are in film_gradients.cuh.
#pragma once

#include "cuda/kernels/film_gradients.cuh"

namespace dgl_ext {

template <class C>
struct FilmBackward : FilmGradients<C, false> {
  using Gradients = FilmGradients<C, false>;
  using typename Gradients::Arguments;
  using typename Gradients::T;

  static __device__ __forceinline__ void run(const Arguments& args) {
    T* shared = shared_memory<C>();
    const RowRange all{0, args.problem.head.rows};
    Gradients::copy_gradients(args, all);
    Gradients::prepare_features(args, all);
    grid_sync();
    Gradients::run_head_tiles(args, shared, all);
    grid_sync();
    Gradients::combine(args, all);
    grid_sync();
    Gradients::run_film_tiles(args, shared, all);
    if (args.plan.partials || args.plan.out_partials) {
      grid_sync();
      Gradients::add_row_splits(args, shared);
    }
  }
};

}  // namespace dgl_ext
