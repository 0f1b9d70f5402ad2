// The library executor of concat and sum. Forward: products, one kernel that writes all logits.
// Step, by chunks of rows: products, the rows kernel, products; in the end one kernel for biases,
// losses and absent rows.
#include "cuda/kernels/linear_backward.cuh"
#include "cuda/kernels/linear_step.cuh"
#include "cuda/library/library.cuh"
#include "cuda/library/library.h"

namespace dgl_ext::library {
namespace {

template <class C>
struct WriteLinearLogits : ElementKernel<OfRows<LinearForwardArguments>> {
  static __device__ __forceinline__ void run(const OfRows<LinearForwardArguments>& logits) {
    LinearForward<C>::write_logits(logits.args, logits.rows);
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
    LinearGradients<C, false>::finish(args, shared_memory<C>());
  }
};

template <class C>
struct LinearRows : ElementKernel<OfRows<LinearStepArguments>, StepLosses<C>::kSharedBytes> {
  using Step = LinearStep<C>;
  static __device__ __forceinline__ void run(const OfRows<LinearStepArguments>& chunk) {
    auto* shared = shared_memory<C>();
    const LinearStepArguments& args = chunk.args;
    RowRange rows = chunk.rows;
    hide_origin(rows.begin);
    hide_origin(rows.count);
    count_by_one_cta<C>(args.step, rows);
    Step::Losses::run_rows(args.step, shared, rows, LinearLogits<C>{args.forward});
    if (!args.step.plan.gradients) return;
    Step::Gradients::copy_masked(args.backward, rows);
    Step::Gradients::sum_biases(args.backward, shared, rows);
  }
};
template <class C>
struct FinishLinearStep : ElementKernel<LinearStepArguments, StepLosses<C>::kSharedBytes> {
  using Step = LinearStep<C>;
  static __device__ __forceinline__ void run(const LinearStepArguments& args) {
    auto* shared = shared_memory<C>();
    if (blockIdx.x == gridDim.x - 1) Step::Losses::finish(args.step, shared);
    if (args.step.plan.gradients) Step::Gradients::finish(args.backward, shared);
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
}

/// What a product of the gradients takes as g: as the plan says, with its scale.
ConstMatrix source_of(const Run& run, const LinearBackwardArguments& args, const GradientSource& s,
                      int64_t count, Matmul& product) {
  product.scale = run.scale(s.gradient);
  if (!run.in_step()) product.alpha = s.scale;
  if (s.plane >= 0) {
    return plane(args.workspace, args.plan.plane_offset, s.plane * count * args.plan.padded_classes,
                 args.plan.padded_classes, run.dtype());
  }
  return s.gradient == 0 ? args.problem.grad_fused : args.problem.grad_unimodal[s.gradient - 1];
}

/// g^T h_i for the weights and g W_i for the features.
void multiply_gradients(Run& run, const LinearBackwardArguments& args, RowRange rows) {
  const LinearHeadBackward& p = args.problem;
  const LinearBackwardPlan& plan = args.plan;
  Matrix sums{at(args.workspace, plan.weight_partial_offset), plan.weight_partial_columns};
  for (int i = 0; i < p.head.modalities; ++i) {
    Matmul product;
    product.rows = p.head.classes;
    product.columns = p.head.width[i];
    product.depth = rows.count;
    product.a_transposed = true;
    const MaskedCopy& masked = plan.masked[i];
    product.b = masked.pitch > 0
                    ? ConstMatrix{at(args.workspace, masked.offset), masked.pitch}
                    : moved(p.head.feature[i], rows.begin * p.head.feature[i].stride, run.dtype());
    product.accumulate = rows.begin > 0;
    // in float32 until the last chunk
    product.result = plan.partials ? accumulator(run.dtype()) : run.output();
    product.c = plan.partials ? sums : p.grad_weight[i];
    sums = moved(sums, round_up(p.head.width[i], kRun), accumulator(run.dtype()));
    if (!p.grad_weight[i].data) continue;
    product.a = source_of(run, args, plan.to_weight[i], rows.count, product);
    run.add(product);
  }
  for (int i = 0; i < p.head.modalities; ++i) {
    if (!p.grad_feature[i].data) continue;
    Matmul product;
    product.rows = rows.count;
    product.columns = p.head.width[i];
    product.depth = p.head.classes;
    product.a = source_of(run, args, plan.to_feature[i], rows.count, product);
    product.b = p.head.weight[i];
    product.result = run.output();
    product.c = moved(p.grad_feature[i], rows.begin * p.grad_feature[i].stride, product.result);
    run.add(product);
  }
}

}  // namespace

cudaError_t linear_forward(const LinearHeadForward& problem, Precision precision,
                           const LinearForwardPlan& plan, void* workspace, const Queue& queue) {
  const LinearForwardArguments arguments{problem, plan, workspace};
  Run run(precision, plan.launch, queue);
  for (int64_t begin = 0; begin < problem.head.rows; begin += plan.plane_rows) {
    const RowRange rows{begin, smaller(plan.plane_rows, problem.head.rows - begin)};
    multiply_features(run, arguments, rows);
    run.launch<WriteLinearLogits>(OfRows<LinearForwardArguments>{arguments, rows});
  }
  return run.flush();
}

cudaError_t linear_backward(const LinearHeadBackward& problem, Precision precision,
                            const LinearBackwardPlan& plan, void* workspace, const Queue& queue) {
  const LinearBackwardArguments arguments{problem, plan, workspace};
  Run run(precision, plan.launch, queue);
  run.launch<PrepareLinear>(arguments);
  multiply_gradients(run, arguments, {0, problem.head.rows});
  run.launch<FinishLinearBackward>(arguments);
  return run.flush();
}

cudaError_t linear_step(const LinearStepArguments& arguments, Precision precision,
                        const LinearStepPlan& plan, const Queue& queue) {
  const StepContext& step = arguments.step;
  const Scales scales(step);
  Run run(precision, plan.launch, queue, &scales);
  count_rows(run, step);
  for (int chunk = 0; chunk < step.plan.chunks; ++chunk) {
    const RowRange rows = step.chunk(chunk);
    multiply_features(run, arguments.forward, rows);
    run.launch<LinearRows>(OfRows<LinearStepArguments>{arguments, rows});
    if (step.plan.gradients) multiply_gradients(run, arguments.backward, rows);
  }
  run.launch<FinishLinearStep>(arguments);
  return run.flush();
}

}  // namespace dgl_ext::library
