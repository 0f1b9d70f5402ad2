// What the library executor's launches share. Its element-wise kernels are the phases of the fused
// executor, each as a launch of its own; the products between them are matmul.h's.
#pragma once

#include "cuda/kernels/cross_entropy.cuh"
#include "cuda/kernels/instances.cuh"
#include "cuda/library/matmul.h"

namespace dgl_ext::library {

/// What is alike in this executor's kernels.
template <class A, int kBytes = 0>
struct ElementKernel {
  using Arguments = A;
  static constexpr int kSharedBytes = kBytes;
};

/// Arguments of a phase, and the rows that it works on.
template <class A>
struct OfRows {
  A args;
  RowRange rows;
};

/// Rows with a target, counted by all CTAs.
template <class C>
struct CountRows : ElementKernel<StepContext, C::kThreads* int(sizeof(StepCount))> {
  static __device__ __forceinline__ void run(const StepContext& step) {
    StepLosses<C>::count(step, shared_memory<C>());
  }
};

/// One CTA of the first rows kernel counts the rows where no launch before it did.
template <class C>
__device__ __forceinline__ void count_by_one_cta(const StepContext& step, RowRange rows) {
  if (rows.begin > 0 || step.plan.count_first || blockIdx.x > 0) return;
  StepLosses<C>::count(step, shared_memory<C>());
}

inline void* at(void* workspace, int64_t offset) { return static_cast<char*>(workspace) + offset; }
inline ConstMatrix plane(void* workspace, int64_t offset, int64_t elements, int64_t pitch,
                         Dtype dtype) {
  return moved(ConstMatrix{at(workspace, offset), pitch}, elements, dtype);
}
/// Sums and saved intermediates.
constexpr Dtype accumulator(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

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

/// Launches and products, one after the other; none once one has failed. `scales` are those of a
/// step.
class Run {
 public:
  Run(Precision precision, const LaunchShape& shape, const Queue& queue,
      const Scales* scales = nullptr)
      : precision_(precision), shape_(shape), queue_(queue), scales_(scales) {}

  template <template <class> class Kernel, class Arguments>
  void launch(const Arguments& arguments) {
    if (flush() != cudaSuccess) return;
    status_ = launch_head<Kernel>(ElementConfigs{}, dtype(), shape_, arguments, queue_.stream);
  }
  /// Products that are added are computed together, before the next launch or at the end.
  void add(const Matmul& product) { products_[count_++] = product; }
  /// Queues the products that were added; returns the first error of all.
  cudaError_t flush() {
    if (status_ == cudaSuccess) {
      const StepTotals* constants = in_step() ? scales_->constants() : nullptr;
      status_ = matmul(queue_, precision_, constants, products_, count_);
    }
    count_ = 0;
    return status_;
  }

  bool in_step() const { return scales_ != nullptr; }
  Dtype dtype() const { return precision_.dtype; }
  /// The dtype of gradients.
  Dtype output() const {
    return in_step() && dtype() == Dtype::kFloat16 ? Dtype::kFloat32 : dtype();
  }
  /// Of a branch's gradients, in a step.
  const StepTotals* scale(int branch) const { return in_step() ? scales_->of(branch) : nullptr; }

 private:
  const Precision precision_;
  const LaunchShape& shape_;
  const Queue& queue_;
  const Scales* const scales_;
  /// At most those of the weights' and features' gradients, and of the next chunk's logits.
  Matmul products_[3 * kMaxModalities];
  int count_ = 0;
  cudaError_t status_ = cudaSuccess;
};

/// Before the first chunk of a step, where one CTA cannot count its rows in passing.
inline void count_rows(Run& run, const StepContext& step) {
  if (step.plan.count_first) run.launch<CountRows>(step);
}

}  // namespace dgl_ext::library
