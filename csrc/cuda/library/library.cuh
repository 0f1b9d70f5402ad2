// What the library executor's launches share. Its element-wise kernels are the phases of the fused
// executor, each as a launch of its own; the products between them are matmul.h's.
#pragma once

#include "cuda/kernels/cross_entropy.cuh"
#include "cuda/kernels/instances.cuh"
#include "cuda/library/matmul.h"

namespace dgl_ext::library {

/// What is alike in this executor's kernels; they have no tiles to count.
template <class A, int kBytes = 0>
struct ElementKernel {
  using Arguments = A;
  static constexpr int kSharedBytes = kBytes;
  static void count_tiles(Arguments&) {}
};

/// Rows with a target, counted by all CTAs.
struct CountArguments {
  CrossEntropy loss;
  StepPlan plan;
  const uint8_t* present[kMaxModalities];
  int64_t rows, classes;
  void* workspace;
};
template <class C>
struct CountRows : ElementKernel<CountArguments, C::kThreads* int(sizeof(StepCount))> {
  static __device__ __forceinline__ void run(const CountArguments& args) {
    const StepContext step{args.loss, args.plan,    args.present,
                           args.rows, args.classes, args.workspace};
    StepLosses<C>::count(step, shared_memory<C>());
  }
};

/// One CTA of the rows kernel counts the rows where no launch before it did.
template <class C>
__device__ __forceinline__ void count_by_one_cta(const StepContext& step, typename C::T* shared) {
  if (!step.plan.count_first && blockIdx.x == 0) StepLosses<C>::count(step, shared);
}

inline void* at(void* workspace, int64_t offset) { return static_cast<char*>(workspace) + offset; }
inline ConstMatrix moved(const ConstMatrix& m, int64_t elements, Dtype dtype) {
  return {static_cast<const char*>(m.data) + elements * element_size(dtype), m.stride};
}
inline Matrix moved(const Matrix& m, int64_t elements, Dtype dtype) {
  return {static_cast<char*>(m.data) + elements * element_size(dtype), m.stride};
}
inline ConstMatrix plane(void* workspace, int64_t offset, int64_t elements, int64_t pitch,
                         Dtype dtype) {
  return moved(ConstMatrix{at(workspace, offset), pitch}, elements, dtype);
}
/// Sums and saved intermediates.
constexpr Dtype accumulator(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}
/// The gradients of a step.
constexpr Dtype step_output(Dtype dtype) {
  return dtype == Dtype::kFloat16 ? Dtype::kFloat32 : dtype;
}

/// Launches and products, one after the other; none once one has failed.
class Run {
 public:
  Run(Precision precision, const LaunchShape& shape, const Queue& queue,
      const StepTotals* constants = nullptr)
      : precision_(precision), shape_(shape), queue_(queue), constants_(constants) {}

  template <template <class> class Kernel, class Arguments>
  void launch(const Arguments& arguments) {
    if (status_ != cudaSuccess) return;
    status_ = launch_head<Kernel>(ElementConfigs{}, dtype(), shape_, arguments, queue_.stream);
  }
  /// Products that are added are computed together, by `multiply`.
  void add(const Matmul& product) { products_[count_++] = product; }
  void multiply() {
    if (status_ == cudaSuccess) {
      status_ = matmul(queue_, precision_, constants_, products_, count_);
    }
    count_ = 0;
  }

  Dtype dtype() const { return precision_.dtype; }
  cudaError_t status() const { return status_; }

 private:
  const Precision precision_;
  const LaunchShape& shape_;
  const Queue& queue_;
  const StepTotals* const constants_;
  Matmul products_[kMaxModalities];
  int count_ = 0;
  cudaError_t status_ = cudaSuccess;
};

/// Scales of the branches' gradients, which the rows kernel writes, and the constants behind them.
struct Scales {
  const StepTotals* totals;
  int branches;
  bool shared;  ///< branches 1.. have one and the same

  explicit Scales(const StepContext& step)
      : totals(static_cast<const StepTotals*>(at(step.workspace, step.plan.totals_offset))),
        branches(step.plan.branches),
        shared(true) {
    const CrossEntropy& loss = step.loss;
    for (int k = 1; k < branches; ++k) {
      shared &= loss.alpha[k - 1] == loss.alpha[0] && !(loss.mean && step.present[k - 1]);
    }
  }
  /// Products with one address may run together.
  const StepTotals* of(int branch) const { return totals + (branch > 0 && shared ? 1 : branch); }
  const StepTotals* constants() const { return totals + branches; }
};

/// Before the first chunk of a step, where one CTA cannot count its rows in passing.
inline void count_rows(Run& run, const StepContext& step) {
  if (!step.plan.count_first) return;
  CountArguments arguments{step.loss, step.plan, {}, step.rows, step.classes, step.workspace};
  for (int k = 1; k < step.plan.branches; ++k) arguments.present[k - 1] = step.present[k - 1];
  run.launch<CountRows>(arguments);
}

}  // namespace dgl_ext::library
