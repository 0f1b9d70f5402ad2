// What the phases of a training step share, of any head.
#pragma once

#include <algorithm>
#include <iterator>

#include "cuda/kernels/phases.cuh"

namespace dgl_ext {

struct StepContext {
  CrossEntropy loss;
  StepPlan plan;
  int64_t rows, classes;
  void* workspace;
  const uint8_t* present[kMaxModalities] = {};  ///< a mask per unimodal branch

  template <class Head>
  StepContext(const CrossEntropy& loss, const StepPlan& plan, const Head& head, void* workspace)
      : loss(loss), plan(plan), rows(head.rows), classes(head.classes), workspace(workspace) {
    std::copy(std::begin(head.present), std::end(head.present), present);
  }
  /// The rows of a chunk.
  __host__ __device__ RowRange chunk(int index) const {
    const int64_t begin = index * plan.chunk_rows;
    return {begin, smaller(plan.chunk_rows, rows - begin)};
  }
};

}  // namespace dgl_ext
