// Backward launch of the linear head.
#pragma once

#include "cuda/kernels/linear_gradients.cuh"

namespace dgl_ext {

template <class C>
struct LinearBackward : LinearGradients<C, false> {
  using Gradients = LinearGradients<C, false>;
  using typename Gradients::Accumulator;
  using typename Gradients::Arguments;
  using typename Gradients::T;

  static __device__ __forceinline__ void run(const Arguments& args) {
    T* shared = shared_memory<C>();
    const RowRange all{0, args.problem.head.rows};
    if (args.plan.plane_count > 0 || args.plan.has_masked) {
      make_planes(args, all);
      Gradients::copy_masked(args, all);
      grid_sync();
    }
    Gradients::run_tiles(args, shared, all);
    if (args.plan.partials) {
      grid_sync();
      Gradients::add_row_splits(args, shared);
    }
  }

  static __device__ __forceinline__ void make_planes(const Arguments& args, RowRange all) {
    const LinearHeadBackward& p = args.problem;
#pragma unroll 1
    for (int i = 0; i < args.plan.plane_count; ++i) {
      const GradientPlane& job = args.plan.planes[i];
      T* out = Gradients::plane(args, i, all);
      const auto make = [&](int64_t row, int64_t column, int count) {
        Accumulator v[kRun];
        read_run<T>(Gradients::gradient(p, job.first), row, column, count, v);
#pragma unroll 1
        for (int k = job.begin; k < job.end; ++k) {
          add_run<T>(Gradients::gradient(p, k), row, column, count, job.leak, v);
        }
        write_run(out + row * args.plan.padded_classes + column, v, count);
      };
      for_each_run_of<C::kThreads>(all.count, p.head.classes, make);
    }
  }
};

}  // namespace dgl_ext
