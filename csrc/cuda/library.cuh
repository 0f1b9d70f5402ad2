// What the library executor's launches share. Its element-wise kernels are the phases of the fused
// executor, each as a launch of its own; the products between them are matmul.h's.
#pragma once

#include "cross_entropy.cuh"
#include "instances.cuh"
#include "matmul.h"

namespace dgl_ext::library {

/// Rows with a target, counted by all CTAs.
struct CountArguments {
  CrossEntropy loss;
  StepPlan plan;
  const uint8_t* present[kMaxModalities];
  int64_t rows, classes;
  void* workspace;
};
template <class C>
struct CountRows {
  using Arguments = CountArguments;
  static constexpr int kSharedBytes = C::kThreads * int(sizeof(int64_t));
  static void count_tiles(Arguments&) {}
  static __device__ __forceinline__ void run(const Arguments& args) {
    const StepContext step{args.loss, args.plan,    args.present,
                           args.rows, args.classes, args.workspace};
    StepLosses<C>::count(step, reinterpret_cast<typename C::T*>(dynamic_shared_memory()));
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

/// The products of one phase, computed together.
class Products {
 public:
  Products(const Queue& queue, Precision precision, const StepTotals* constants = nullptr)
      : queue_(queue), precision_(precision), constants_(constants) {}
  void add(const Matmul& product) { products_[count_++] = product; }
  cudaError_t run() {
    const int count = count_;
    count_ = 0;
    return matmul(queue_, precision_, constants_, products_, count);
  }

 private:
  const Queue& queue_;
  const Precision precision_;
  const StepTotals* const constants_;
  Matmul products_[kMaxModalities];
  int count_ = 0;
};

/// Scales of the branches' gradients, which the rows kernel writes, and the constants behind them.
struct Scales {
  const StepTotals* totals;
  int branches;
  bool shared;  ///< branches 1.. have one and the same

  Scales(void* workspace, const StepPlan& plan, const CrossEntropy& loss,
         const uint8_t* const* present)
      : totals(static_cast<const StepTotals*>(at(workspace, plan.totals_offset))),
        branches(plan.branches),
        shared(true) {
    for (int k = 1; k < branches; ++k) {
      shared &= loss.alpha[k - 1] == loss.alpha[0] && !(loss.mean && present[k - 1]);
    }
  }
  /// Products with one address may run together.
  const StepTotals* of(int branch) const { return totals + (branch > 0 && shared ? 1 : branch); }
  const StepTotals* constants() const { return totals + branches; }
};

template <class Head>
CountArguments count_arguments(const Head& head, const CrossEntropy& loss, const StepPlan& plan,
                               void* workspace) {
  CountArguments arguments{loss, plan, {}, head.rows, head.classes, workspace};
  for (int k = 1; k < plan.branches; ++k) arguments.present[k - 1] = head.present[k - 1];
  return arguments;
}

}  // namespace dgl_ext::library
