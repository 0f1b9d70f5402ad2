// The library executor of concat and sum. Forward: products, one kernel that writes all logits.
// Step, by chunks of rows: products, the rows kernel, products; in the end one kernel for biases,
// losses and absent rows.
#include "library.cuh"
#include "linear_backward.cuh"
#include "linear_library.h"
#include "linear_step.cuh"

namespace dgl_ext::library {
namespace {

template <class C>
__device__ __forceinline__ typename C::T* shared_memory() {
  return reinterpret_cast<typename C::T*>(dynamic_shared_memory());
}

struct LogitsArguments {
  LinearForwardArguments forward;
  RowRange rows;
};
template <class C>
struct WriteLinearLogits {
  using Arguments = LogitsArguments;
  static constexpr int kSharedBytes = 0;
  static void count_tiles(Arguments&) {}
  static __device__ __forceinline__ void run(const Arguments& args) {
    LinearForward<C>::write_logits(args.forward, args.rows);
  }
};

template <class C>
struct PrepareLinear {
  using Arguments = LinearBackwardArguments;
  using Gradients = LinearGradients<C, false>;
  static constexpr int kSharedBytes = StepLosses<C>::kSharedBytes;
  static void count_tiles(Arguments&) {}
  static __device__ __forceinline__ void run(const Arguments& args) {
    const RowRange all{0, args.problem.head.rows};
    LinearBackward<C>::make_planes(args, all);
    Gradients::copy_masked(args, all);
    Gradients::sum_biases(args, shared_memory<C>(), all);
  }
};
template <class C>
struct FinishLinearBackward {
  using Arguments = LinearBackwardArguments;
  static constexpr int kSharedBytes = StepLosses<C>::kSharedBytes;
  static void count_tiles(Arguments&) {}
  static __device__ __forceinline__ void run(const Arguments& args) {
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
struct LinearRows {
  using Arguments = RowsArguments;
  using Step = LinearStep<C>;
  static constexpr int kSharedBytes = StepLosses<C>::kSharedBytes;
  static void count_tiles(Arguments&) {}
  static __device__ __forceinline__ void run(const Arguments& args) {
    auto* shared = shared_memory<C>();
    const StepContext step = Step::context(args.step);
    const RowRange rows = Step::chunk_of(args.step, args.chunk);
    if (args.chunk == 0) count_by_one_cta<C>(step, shared);
    Step::Losses::run_rows(step, shared, rows, LinearLogits<C>{args.step.forward});
    if (!step.plan.gradients) return;
    Step::Gradients::copy_masked(args.step.backward, rows);
    Step::Gradients::sum_biases(args.step.backward, shared, rows);
  }
};
template <class C>
struct FinishLinearStep {
  using Arguments = LinearStepArguments;
  using Step = LinearStep<C>;
  using Gradients = typename Step::Gradients;
  static constexpr int kSharedBytes = StepLosses<C>::kSharedBytes;
  static void count_tiles(Arguments&) {}
  static __device__ __forceinline__ void run(const Arguments& args) {
    auto* shared = shared_memory<C>();
    const LinearHeadBackward& p = args.backward.problem;
    const StepContext step = Step::context(args);
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

/// P_i = h_i W_i^T for rows [begin, begin + count), to the planes of the workspace.
cudaError_t multiply_features(const LinearHead& head, const LinearForwardPlan& plan,
                              Precision precision, void* workspace, int64_t begin, int64_t count,
                              const Queue& queue) {
  Products products(queue, precision);
  const Dtype sums = accumulator(precision.dtype);
  Matrix to{workspace, plan.padded_classes};
  for (int i = 0; i < head.modalities; ++i) {
    if (head.width[i] == 0) continue;  // no split: nothing reads its plane
    Matmul product;
    product.rows = count;
    product.columns = head.classes;
    product.depth = head.width[i];
    product.a = moved(head.feature[i], begin * head.feature[i].stride, precision.dtype);
    product.b = head.weight[i];
    product.b_transposed = true;
    product.c = to;
    product.result = sums;
    products.add(product);
    to = moved(to, plan.plane_rows * plan.padded_classes, sums);
  }
  return products.run();
}

/// g^T h_i for the weights and g W_i for the features, g being what the plan says.
class Gradients {
 public:
  Gradients(const LinearHeadBackward& problem, const LinearBackwardPlan& plan, Precision precision,
            void* workspace, const Queue& queue, const Scales* scales)
      : p_(problem),
        plan_(plan),
        precision_(precision),
        workspace_(workspace),
        scales_(scales),
        products_(queue, precision, scales ? scales->constants() : nullptr),
        output_(scales ? step_output(precision.dtype) : precision.dtype) {}

  cudaError_t run(int64_t begin, int64_t count) {
    for (int i = 0; i < p_.head.modalities; ++i) {
      if (p_.grad_weight[i].data) products_.add(weight(i, begin, count));
    }
    const cudaError_t status = products_.run();
    if (status != cudaSuccess) return status;
    for (int i = 0; i < p_.head.modalities; ++i) {
      if (p_.grad_feature[i].data) products_.add(feature(i, begin, count));
    }
    return products_.run();
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
                   plan_.padded_classes, precision_.dtype);
    }
    return s.gradient == 0 ? p_.grad_fused : p_.grad_unimodal[s.gradient - 1];
  }

  Matmul weight(int i, int64_t begin, int64_t count) const {
    Matmul product;
    product.rows = p_.head.classes;
    product.columns = p_.head.width[i];
    product.depth = count;
    product.a = source(plan_.to_weight[i], count, product);
    product.a_transposed = true;
    const MaskedCopy& masked = plan_.masked[i];
    product.b = masked.pitch > 0 ? ConstMatrix{at(workspace_, masked.offset), masked.pitch}
                                 : moved(p_.head.feature[i], begin * p_.head.feature[i].stride,
                                         precision_.dtype);
    product.accumulate = begin > 0;
    product.c = p_.grad_weight[i];
    product.result = output_;
    if (plan_.partials) {  // in float32 until the last chunk
      int64_t column = 0;
      for (int j = 0; j < i; ++j) column += (p_.head.width[j] + 3) / 4 * 4;
      product.result = accumulator(precision_.dtype);
      product.c =
          moved(Matrix{at(workspace_, plan_.weight_partial_offset), plan_.weight_partial_columns},
                column, product.result);
    }
    return product;
  }

  Matmul feature(int i, int64_t begin, int64_t count) const {
    Matmul product;
    product.rows = count;
    product.columns = p_.head.width[i];
    product.depth = p_.head.classes;
    product.a = source(plan_.to_feature[i], count, product);
    product.b = p_.head.weight[i];
    product.c = moved(p_.grad_feature[i], begin * p_.grad_feature[i].stride, output_);
    product.result = output_;
    return product;
  }

  const LinearHeadBackward& p_;
  const LinearBackwardPlan& plan_;
  const Precision precision_;
  void* const workspace_;
  const Scales* const scales_;
  Products products_;
  const Dtype output_;
};

}  // namespace

cudaError_t linear_forward(const LinearHeadForward& problem, Precision precision,
                           const LinearForwardPlan& plan, void* workspace, const Queue& queue) {
  LogitsArguments arguments{{problem, plan, workspace}, {}};
  cudaError_t status = cudaSuccess;
  for (int64_t begin = 0; begin < problem.head.rows && status == cudaSuccess;
       begin += plan.plane_rows) {
    arguments.rows = {begin, smaller(plan.plane_rows, problem.head.rows - begin)};
    status = multiply_features(problem.head, plan, precision, workspace, begin,
                               arguments.rows.count, queue);
    if (status != cudaSuccess) break;
    status = launch_head<WriteLinearLogits>(ElementConfigs{}, precision.dtype, plan.launch,
                                            arguments, queue.stream);
  }
  return status;
}

cudaError_t linear_backward(const LinearHeadBackward& problem, Precision precision,
                            const LinearBackwardPlan& plan, void* workspace, const Queue& queue) {
  const LinearBackwardArguments arguments{problem, plan, workspace};
  cudaError_t status = launch_head<PrepareLinear>(ElementConfigs{}, precision.dtype, plan.launch,
                                                  arguments, queue.stream);
  if (status != cudaSuccess) return status;
  Gradients gradients(problem, plan, precision, workspace, queue, nullptr);
  status = gradients.run(0, problem.head.rows);
  if (status != cudaSuccess) return status;
  return launch_head<FinishLinearBackward>(ElementConfigs{}, precision.dtype, plan.launch,
                                           arguments, queue.stream);
}

cudaError_t linear_step(const LinearStepArguments& arguments, Precision precision,
                        const LinearStepPlan& plan, const Queue& queue) {
  const LinearHead& head = arguments.forward.problem.head;
  void* const workspace = arguments.forward.workspace;
  const Scales scales(workspace, plan.step, arguments.loss, head.present);
  Gradients gradients(arguments.backward.problem, plan.backward, precision, workspace, queue,
                      &scales);
  cudaError_t status = cudaSuccess;
  if (plan.step.count_first) {
    status = launch_head<CountRows>(
        ElementConfigs{}, precision.dtype, plan.launch,
        count_arguments(arguments.forward.problem.head, arguments.loss, plan.step, workspace),
        queue.stream);
  }
  for (int chunk = 0; chunk < plan.step.chunks && status == cudaSuccess; ++chunk) {
    const int64_t begin = chunk * plan.step.chunk_rows;
    const int64_t count = smaller(plan.step.chunk_rows, head.rows - begin);
    status = multiply_features(head, plan.forward, precision, workspace, begin, count, queue);
    if (status != cudaSuccess) break;
    status = launch_head<LinearRows>(ElementConfigs{}, precision.dtype, plan.launch,
                                     RowsArguments{arguments, chunk}, queue.stream);
    if (status == cudaSuccess && plan.step.gradients) status = gradients.run(begin, count);
  }
  if (status != cudaSuccess) return status;
  return launch_head<FinishLinearStep>(ElementConfigs{}, precision.dtype, plan.launch, arguments,
                                       queue.stream);
}

}  // namespace dgl_ext::library
