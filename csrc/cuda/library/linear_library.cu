// The library executor of concat and sum. Forward: products, one kernel that writes all logits.
// Step, by chunks of rows: products, the rows kernel, products; in the end one kernel for biases,
// losses and absent rows.
#include "cuda/kernels/linear_backward.cuh"
#include "cuda/kernels/linear_step.cuh"
#include "cuda/library/library.cuh"
#include "cuda/library/library.h"

namespace dgl_ext::library {
namespace {

struct LogitsArguments {
  LinearForwardArguments forward;
  RowRange rows;
};
template <class C>
struct WriteLinearLogits : ElementKernel<LogitsArguments> {
  static __device__ __forceinline__ void run(const LogitsArguments& args) {
    LinearForward<C>::write_logits(args.forward, args.rows);
  }
};

template <class C>
struct PrepareLinear : ElementKernel<LinearBackwardArguments, StepLosses<C>::kSharedBytes> {
  using Gradients = LinearGradients<C, false>;
  static __device__ __forceinline__ void run(const LinearBackwardArguments& args) {
    const RowRange all{0, args.problem.head.rows};
    LinearBackward<C>::make_planes(args, all);
    Gradients::copy_masked(args, all);
    Gradients::sum_biases(args, shared_memory<C>(), all);
  }
};
template <class C>
struct FinishLinearBackward : ElementKernel<LinearBackwardArguments, StepLosses<C>::kSharedBytes> {
  static __device__ __forceinline__ void run(const LinearBackwardArguments& args) {
    const LinearHead& head = args.problem.head;
    LinearGradients<C, false>::add_bias_splits(args, shared_memory<C>(), 1);
#pragma unroll 1
    for (int i = 0; i < head.modalities; ++i) {
      clear_absent<C, typename C::T>(args.problem.grad_feature[i], head.rows, head.width[i],
                                     head.present[i]);
    }
  }
};

struct RowsArguments {
  LinearStepArguments step;
  int chunk;
};
template <class C>
struct LinearRows : ElementKernel<RowsArguments, StepLosses<C>::kSharedBytes> {
  using Step = LinearStep<C>;
  static __device__ __forceinline__ void run(const RowsArguments& args) {
    auto* shared = shared_memory<C>();
    const StepContext step = context_of(args.step);
    const RowRange rows = step.chunk(args.chunk);
    if (args.chunk == 0) count_by_one_cta<C>(step, shared);
    Step::Losses::run_rows(step, shared, rows, LinearLogits<C>{args.step.forward});
    if (!step.plan.gradients) return;
    Step::Gradients::copy_masked(args.step.backward, rows);
    Step::Gradients::sum_biases(args.step.backward, shared, rows);
  }
};
template <class C>
struct FinishLinearStep : ElementKernel<LinearStepArguments, StepLosses<C>::kSharedBytes> {
  using Step = LinearStep<C>;
  using Gradients = typename Step::Gradients;
  static __device__ __forceinline__ void run(const LinearStepArguments& args) {
    auto* shared = shared_memory<C>();
    const LinearHeadBackward& p = args.backward.problem;
    const StepContext step = context_of(args);
    if (blockIdx.x == gridDim.x - 1) Step::Losses::finish(step, shared);
    if (!step.plan.gradients) return;
    if (args.backward.plan.partials) Gradients::add_weight_splits(args.backward);
    Gradients::add_bias_splits(args.backward, shared,
                               Gradients::scale_of(args.backward, GradientSource{0, 0, 1}));
#pragma unroll 1
    for (int i = 0; i < p.head.modalities; ++i) {
      clear_absent<C, typename Gradients::Output>(p.grad_feature[i], p.head.rows, p.head.width[i],
                                                  p.head.present[i]);
    }
  }
};

/// P_i = h_i W_i^T for a range of rows, to the planes of the workspace.
void multiply_features(Run& run, const LinearForwardArguments& args, RowRange rows) {
  const LinearHead& head = args.problem.head;
  Matrix to{args.workspace, args.plan.padded_classes};
  for (int i = 0; i < head.modalities; ++i) {
    if (head.width[i] == 0) continue;  // no split: nothing reads its plane
    Matmul product;
    product.rows = rows.count;
    product.columns = head.classes;
    product.depth = head.width[i];
    product.a = moved(head.feature[i], rows.begin * head.feature[i].stride, run.dtype());
    product.b = head.weight[i];
    product.b_transposed = true;
    product.c = to;
    product.result = accumulator(run.dtype());
    run.add(product);
    to = moved(to, args.plan.plane_rows * args.plan.padded_classes, product.result);
  }
  run.multiply();
}

/// g^T h_i for the weights and g W_i for the features, g being what the plan says.
class Gradients {
 public:
  Gradients(Run& run, const LinearBackwardArguments& arguments, const Scales* scales)
      : run_(run),
        p_(arguments.problem),
        plan_(arguments.plan),
        workspace_(arguments.workspace),
        scales_(scales),
        dtype_(run.dtype()),
        output_(scales ? step_output(dtype_) : dtype_) {}

  void multiply(RowRange rows) {
    for (int i = 0; i < p_.head.modalities; ++i) {
      if (p_.grad_weight[i].data) run_.add(weight(i, rows));
    }
    run_.multiply();
    for (int i = 0; i < p_.head.modalities; ++i) {
      if (p_.grad_feature[i].data) run_.add(feature(i, rows));
    }
    run_.multiply();
  }

 private:
  ConstMatrix source(const GradientSource& s, int64_t count, Matmul& product) const {
    if (scales_) {
      product.scale = scales_->of(s.gradient);
    } else {
      product.alpha = s.scale;
    }
    if (s.plane >= 0) {
      return plane(workspace_, plan_.plane_offset, s.plane * count * plan_.padded_classes,
                   plan_.padded_classes, dtype_);
    }
    return s.gradient == 0 ? p_.grad_fused : p_.grad_unimodal[s.gradient - 1];
  }

  Matmul weight(int i, RowRange rows) const {
    Matmul product;
    product.rows = p_.head.classes;
    product.columns = p_.head.width[i];
    product.depth = rows.count;
    product.a = source(plan_.to_weight[i], rows.count, product);
    product.a_transposed = true;
    const MaskedCopy& masked = plan_.masked[i];
    product.b = masked.pitch > 0
                    ? ConstMatrix{at(workspace_, masked.offset), masked.pitch}
                    : moved(p_.head.feature[i], rows.begin * p_.head.feature[i].stride, dtype_);
    product.accumulate = rows.begin > 0;
    product.c = p_.grad_weight[i];
    product.result = output_;
    if (plan_.partials) {  // in float32 until the last chunk
      int64_t column = 0;
      for (int j = 0; j < i; ++j) column += (p_.head.width[j] + 3) / 4 * 4;
      product.result = accumulator(dtype_);
      product.c =
          moved(Matrix{at(workspace_, plan_.weight_partial_offset), plan_.weight_partial_columns},
                column, product.result);
    }
    return product;
  }

  Matmul feature(int i, RowRange rows) const {
    Matmul product;
    product.rows = rows.count;
    product.columns = p_.head.width[i];
    product.depth = p_.head.classes;
    product.a = source(plan_.to_feature[i], rows.count, product);
    product.b = p_.head.weight[i];
    product.c = moved(p_.grad_feature[i], rows.begin * p_.grad_feature[i].stride, output_);
    product.result = output_;
    return product;
  }

  Run& run_;
  const LinearHeadBackward& p_;
  const LinearBackwardPlan& plan_;
  void* const workspace_;
  const Scales* const scales_;
  const Dtype dtype_, output_;
};

}  // namespace

cudaError_t linear_forward(const LinearHeadForward& problem, Precision precision,
                           const LinearForwardPlan& plan, void* workspace, const Queue& queue) {
  const LinearForwardArguments arguments{problem, plan, workspace};
  Run run(precision, plan.launch, queue);
  for (int64_t begin = 0; begin < problem.head.rows; begin += plan.plane_rows) {
    const RowRange rows{begin, smaller(plan.plane_rows, problem.head.rows - begin)};
    multiply_features(run, arguments, rows);
    run.launch<WriteLinearLogits>(LogitsArguments{arguments, rows});
  }
  return run.status();
}

cudaError_t linear_backward(const LinearHeadBackward& problem, Precision precision,
                            const LinearBackwardPlan& plan, void* workspace, const Queue& queue) {
  const LinearBackwardArguments arguments{problem, plan, workspace};
  Run run(precision, plan.launch, queue);
  run.launch<PrepareLinear>(arguments);
  Gradients(run, arguments, nullptr).multiply({0, problem.head.rows});
  run.launch<FinishLinearBackward>(arguments);
  return run.status();
}

cudaError_t linear_step(const LinearStepArguments& arguments, Precision precision,
                        const LinearStepPlan& plan, const Queue& queue) {
  const StepContext step = context_of(arguments);
  const Scales scales(step);
  Run run(precision, plan.launch, queue, scales.constants());
  Gradients gradients(run, arguments.backward, &scales);
  count_rows(run, step);
  for (int chunk = 0; chunk < plan.step.chunks; ++chunk) {
    const RowRange rows = step.chunk(chunk);
    multiply_features(run, arguments.forward, rows);
    run.launch<LinearRows>(RowsArguments{arguments, chunk});
    if (plan.step.gradients) gradients.multiply(rows);
  }
  run.launch<FinishLinearStep>(arguments);
  return run.status();
}

}  // namespace dgl_ext::library
