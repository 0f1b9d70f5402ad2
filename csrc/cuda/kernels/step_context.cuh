// What the phases of a training step share, of any head.
#pragma once

#include "cuda/kernels/phases.cuh"

namespace dgl_ext {

/// What the phases need of a step's arguments; `present` has a mask per unimodal branch.
struct StepContext {
  const CrossEntropy& loss;
  const StepPlan& plan;
  const uint8_t* const* present;
  int64_t rows, classes;
  void* workspace;

  /// The rows of a chunk.
  __host__ __device__ RowRange chunk(int index) const {
    const int64_t begin = index * plan.chunk_rows;
    return {begin, smaller(plan.chunk_rows, rows - begin)};
  }
};
template <class StepArguments>
__host__ __device__ __forceinline__ StepContext context_of(const StepArguments& args) {
  const auto& head = args.forward.problem.head;
  return {args.loss, args.plan, head.present, head.rows, head.classes, args.forward.workspace};
}

}  // namespace dgl_ext
