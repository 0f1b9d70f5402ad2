// The library executor of FiLM: its phases (film_forward.cuh, film_gradients.cuh) as launches of
// their own, with cuBLAS between them.
#include "cuda/kernels/film_backward.cuh"
#include "cuda/kernels/film_step.cuh"
#include "cuda/library/library.cuh"
#include "cuda/library/library.h"

namespace dgl_ext::library {
namespace {

struct ForwardArguments {
  FilmForwardArguments forward;
  RowRange rows;
};
template <class C>
struct ModulateFilm : ElementKernel<ForwardArguments> {
  static __device__ __forceinline__ void run(const ForwardArguments& args) {
    FilmForward<C>::modulate(args.forward, args.rows);
  }
};
template <class C>
struct WriteFilmLogits : ElementKernel<ForwardArguments> {
  static __device__ __forceinline__ void run(const ForwardArguments& args) {
    FilmForward<C>::write_logits(args.forward, args.rows);
  }
};

struct RowsArguments {
  FilmStepArguments step;
  int chunk;
};
template <class C>
struct FilmRows : ElementKernel<RowsArguments, StepLosses<C>::kSharedBytes> {
  using Step = FilmStep<C>;
  static __device__ __forceinline__ void run(const RowsArguments& args) {
    auto* shared = shared_memory<C>();
    const StepContext step = context_of(args.step);
    const RowRange rows = step.chunk(args.chunk);
    if (args.chunk == 0) count_by_one_cta<C>(step, shared);
    Step::Losses::run_rows(step, shared, rows, FilmLogits<C>{args.step.forward});
    if (step.plan.gradients) Step::Gradients::prepare_features(args.step.backward, rows);
  }
};

struct BackwardArguments {
  FilmBackwardArguments backward;
  RowRange rows;
};
template <class C>
struct PrepareFilm : ElementKernel<BackwardArguments> {
  static __device__ __forceinline__ void run(const BackwardArguments& args) {
    FilmGradients<C, false>::copy_gradients(args.backward, args.rows);
    FilmGradients<C, false>::prepare_features(args.backward, args.rows);
  }
};
template <class C, bool kStep>
struct CombineFilm : ElementKernel<BackwardArguments, StepLosses<C>::kSharedBytes> {
  using Gradients = FilmGradients<C, kStep>;
  static __device__ __forceinline__ void run(const BackwardArguments& args) {
    Gradients::combine(args.backward, args.rows);
    Gradients::sum_biases(args.backward, shared_memory<C>(), args.rows);
  }
};
template <class C>
using CombineBackward = CombineFilm<C, false>;
template <class C>
using CombineStep = CombineFilm<C, true>;

template <class C>
struct FinishFilmBackward : ElementKernel<FilmBackwardArguments, StepLosses<C>::kSharedBytes> {
  static __device__ __forceinline__ void run(const FilmBackwardArguments& args) {
    const FilmHeadBackward& p = args.problem;
    FilmGradients<C, false>::add_bias_splits(args, shared_memory<C>(), 1);
    clear_absent<C, typename C::T>(p.grad_condition, p.head.rows, p.head.condition_width,
                                   p.head.present[0]);
  }
};
template <class C>
struct FinishFilmStep : ElementKernel<FilmStepArguments, StepLosses<C>::kSharedBytes> {
  using Step = FilmStep<C>;
  using Gradients = typename Step::Gradients;
  static __device__ __forceinline__ void run(const FilmStepArguments& args) {
    auto* shared = shared_memory<C>();
    const FilmHeadBackward& p = args.backward.problem;
    const StepContext step = context_of(args);
    if (blockIdx.x == gridDim.x - 1) Step::Losses::finish(step, shared);
    if (!step.plan.gradients) return;
    Gradients::add_weight_splits(args.backward);
    Gradients::add_bias_splits(args.backward, shared, Gradients::scale_of(args.backward, 0));
    clear_absent<C, typename Gradients::Output>(p.grad_condition, p.head.rows,
                                                p.head.condition_width, p.head.present[0]);
  }
};

/// [gamma|beta] of a range of rows, as partial sums.
void multiply_film(Run& run, const FilmForwardArguments& args, RowRange rows) {
  const FilmHead& head = args.problem.head;
  const int64_t pitch = args.plan.padded_hidden;
  for (int half = 0; half < 2; ++half) {
    Matmul product;
    product.rows = rows.count;
    product.columns = head.hidden;
    product.depth = head.condition_width;
    product.a = moved(head.condition, rows.begin * head.condition.stride, run.dtype());
    product.b = moved(head.film_weight, half * head.hidden * head.film_weight.stride, run.dtype());
    product.b_transposed = true;
    product.result = accumulator(run.dtype());
    product.c = moved(Matrix{args.workspace, 2 * pitch}, half * pitch, product.result);
    run.add(product);
  }
  run.multiply();
}

/// Logits of the three branches of `count` rows, without their bias.
void multiply_head(Run& run, const FilmForwardArguments& args, int64_t count) {
  const FilmHead& head = args.problem.head;
  const FilmForwardPlan& plan = args.plan;
  for (int k = 0; k < 3; ++k) {
    Matmul product;
    product.rows = count;
    product.columns = head.classes;
    product.depth = head.hidden;
    product.a = plane(args.workspace, plan.features_offset,
                      k * plan.plane_rows * plan.padded_hidden, plan.padded_hidden, run.dtype());
    product.b = head.out_weight;
    product.b_transposed = true;
    product.result = accumulator(run.dtype());
    product.c = moved(Matrix{at(args.workspace, plan.head_partial_offset), plan.padded_classes},
                      k * plan.plane_rows * plan.padded_classes, product.result);
    run.add(product);
  }
  run.multiply();
}

/// The products of the gradients.
class Gradients {
 public:
  Gradients(Run& run, const FilmBackwardArguments& arguments, const Scales* scales)
      : run_(run),
        p_(arguments.problem),
        plan_(arguments.plan),
        workspace_(arguments.workspace),
        scales_(scales),
        dtype_(run.dtype()),
        output_(scales ? step_output(dtype_) : dtype_) {}

  /// Before the combine kernel: d[k] = g_k W_o, and the output's weight.
  void multiply_head(RowRange rows) {
    for (int k = 0; k < 3; ++k) {
      if (!plan_.need_branch[k]) continue;
      Matmul product;
      product.rows = rows.count;
      product.columns = p_.head.hidden;
      product.depth = p_.head.classes;
      product.a = gradient(k, rows.count);
      product.b = p_.head.out_weight;
      product.result = accumulator(dtype_);
      product.c = moved(Matrix{at(workspace_, plan_.branches_offset), plan_.padded_hidden},
                        k * plan_.plane_rows * plan_.padded_hidden, product.result);
      run_.add(product);
    }
    run_.multiply();
    if (!p_.grad_out_weight.data) return;
    int first = 0;  // the branch in slot 0
    while (!plan_.to_out_weight[first]) ++first;
    Matmul product;
    product.rows = p_.head.classes;
    product.columns = p_.head.hidden;
    product.depth = plan_.out_branches * rows.count;
    product.a = gradient(first, rows.count);
    product.a_transposed = true;
    product.b = plane(workspace_, plan_.features_offset, 0, plan_.padded_hidden, dtype_);
    sum_over_chunks(product, rows, p_.grad_out_weight, plan_.out_partials,
                    plan_.out_weight_partial_offset, plan_.padded_hidden);
    run_.add(product);
    run_.multiply();
  }

  /// After it: the film weight, and what reaches x.
  void multiply_film(RowRange rows) {
    const int64_t hidden = p_.head.hidden;
    for (int half = 0; half < 2 && p_.grad_film_weight.data; ++half) {
      Matmul product;
      product.rows = hidden;
      product.columns = p_.head.condition_width;
      product.depth = rows.count;
      product.a = plane(workspace_, plan_.parameters_offset, half * plan_.padded_hidden,
                        2 * plan_.padded_hidden, dtype_);
      product.a_transposed = true;
      product.b = plan_.masked.pitch > 0
                      ? plane(workspace_, plan_.masked.offset, 0, plan_.masked.pitch, dtype_)
                      : moved(p_.head.condition, rows.begin * p_.head.condition.stride, dtype_);
      sum_over_chunks(product, rows, p_.grad_film_weight, plan_.partials,
                      plan_.film_weight_partial_offset, round_up(p_.head.condition_width, 8));
      product.c = moved(product.c, half * hidden * product.c.stride, product.result);
      run_.add(product);
    }
    run_.multiply();
    if (!p_.grad_condition.data) return;
    const int64_t first_half = plan_.condition_leak ? 0 : 1;
    Matmul product;
    product.rows = rows.count;
    product.columns = p_.head.condition_width;
    product.depth = (2 - first_half) * hidden;
    product.a = plane(workspace_, plan_.encoder_offset, 0, plan_.encoder_pitch, dtype_);
    product.b =
        moved(p_.head.film_weight, first_half * hidden * p_.head.film_weight.stride, dtype_);
    product.c = moved(p_.grad_condition, rows.begin * p_.grad_condition.stride, output_);
    product.result = output_;
    product.scale = scale(1);
    run_.add(product);
    run_.multiply();
  }

 private:
  /// Where a leak is open the planes are weighted, and all of them have the fused branch's scale.
  const StepTotals* scale(int k) const {
    return scales_ ? scales_->of(plan_.weighted ? 0 : k) : nullptr;
  }
  ConstMatrix gradient(int k, int64_t count) const {
    if (scales_ || plan_.copy_gradients) {
      return plane(workspace_, plan_.gradients_offset, plan_.slot[k] * count * plan_.padded_classes,
                   plan_.padded_classes, dtype_);
    }
    return k == 0 ? p_.grad_fused : p_.grad_unimodal[k - 1];
  }
  /// To the result itself, or in float32 until the last chunk.
  void sum_over_chunks(Matmul& product, RowRange rows, const Matrix& result, bool partial,
                       int64_t offset, int64_t pitch) const {
    product.result = partial ? accumulator(dtype_) : output_;
    product.c = partial ? Matrix{at(workspace_, offset), pitch} : result;
    product.accumulate = rows.begin > 0;
    product.scale = scale(0);
  }

  Run& run_;
  const FilmHeadBackward& p_;
  const FilmBackwardPlan& plan_;
  void* const workspace_;
  const Scales* const scales_;
  const Dtype dtype_, output_;
};

/// The forward phases up to the products that become logits.
void run_forward(Run& run, const ForwardArguments& arguments) {
  multiply_film(run, arguments.forward, arguments.rows);
  run.launch<ModulateFilm>(arguments);
  multiply_head(run, arguments.forward, arguments.rows.count);
}

}  // namespace

cudaError_t film_forward(const FilmHeadForward& problem, Precision precision,
                         const FilmForwardPlan& plan, void* workspace, const Queue& queue) {
  Run run(precision, plan.launch, queue);
  for (int64_t begin = 0; begin < problem.head.rows; begin += plan.plane_rows) {
    ForwardArguments arguments{{problem, plan, workspace},
                               {begin, smaller(plan.plane_rows, problem.head.rows - begin)}};
    arguments.forward.problem.modulation =
        moved(problem.modulation, begin * problem.modulation.stride, accumulator(precision.dtype));
    run_forward(run, arguments);
    run.launch<WriteFilmLogits>(arguments);
  }
  return run.status();
}

cudaError_t film_backward(const FilmHeadBackward& problem, Precision precision,
                          const FilmBackwardPlan& plan, void* workspace, const Queue& queue) {
  const BackwardArguments arguments{{problem, plan, workspace}, {0, problem.head.rows}};
  Run run(precision, plan.launch, queue);
  Gradients gradients(run, arguments.backward, nullptr);
  run.launch<PrepareFilm>(arguments);
  gradients.multiply_head(arguments.rows);
  run.launch<CombineBackward>(arguments);
  gradients.multiply_film(arguments.rows);
  run.launch<FinishFilmBackward>(arguments.backward);
  return run.status();
}

cudaError_t film_step(const FilmStepArguments& arguments, Precision precision,
                      const FilmStepPlan& plan, const Queue& queue) {
  const StepContext step = context_of(arguments);
  const Scales scales(step);
  Run run(precision, plan.launch, queue, scales.constants());
  Gradients gradients(run, arguments.backward, &scales);
  count_rows(run, step);
  for (int chunk = 0; chunk < plan.step.chunks; ++chunk) {
    const RowRange rows = step.chunk(chunk);
    run_forward(run, {arguments.forward, rows});
    run.launch<FilmRows>(RowsArguments{arguments, chunk});
    if (!plan.step.gradients) continue;
    gradients.multiply_head(rows);
    run.launch<CombineStep>(BackwardArguments{arguments.backward, rows});
    gradients.multiply_film(rows);
  }
  run.launch<FinishFilmStep>(arguments);
  return run.status();
}

}  // namespace dgl_ext::library
