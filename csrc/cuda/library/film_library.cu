// The library executor of FiLM: its phases (film_forward.cuh, film_gradients.cuh) as launches of
// their own, with cuBLAS between them.
#include "cuda/kernels/film_backward.cuh"
#include "cuda/kernels/film_step.cuh"
#include "cuda/library/library.cuh"
#include "cuda/library/library.h"

namespace dgl_ext::library {
namespace {

using ForwardRows = OfRows<FilmForwardArguments>;
using BackwardRows = OfRows<FilmBackwardArguments>;
using StepRows = OfRows<FilmStepArguments>;

template <class C>
struct ModulateFilm : ElementKernel<ForwardRows> {
  static __device__ __forceinline__ void run(const ForwardRows& forward) {
    FilmForward<C>::modulate(forward.args, forward.rows);
  }
};
template <class C>
struct WriteFilmLogits : ElementKernel<ForwardRows> {
  static __device__ __forceinline__ void run(const ForwardRows& forward) {
    FilmForward<C>::write_logits(forward.args, forward.rows);
  }
};

template <class C>
struct FilmRows : ElementKernel<StepRows, StepLosses<C>::kSharedBytes> {
  using Step = FilmStep<C>;
  static __device__ __forceinline__ void run(const StepRows& chunk) {
    const FilmStepArguments& args = chunk.args;
    RowRange rows = chunk.rows;
    hide_origin(rows.begin);
    hide_origin(rows.count);
    count_by_one_cta<C>(args.step, rows);
    Step::Losses::run_rows(args.step, shared_memory<C>(), rows, FilmLogits<C>{args.forward});
    if (args.step.plan.gradients) Step::Gradients::prepare_features(args.backward, rows);
  }
};

template <class C>
struct PrepareFilm : ElementKernel<BackwardRows> {
  static __device__ __forceinline__ void run(const BackwardRows& backward) {
    FilmGradients<C, false>::copy_gradients(backward.args, backward.rows);
    FilmGradients<C, false>::prepare_features(backward.args, backward.rows);
  }
};
template <class C, bool kStep>
struct CombineFilm : ElementKernel<BackwardRows, StepLosses<C>::kSharedBytes> {
  using Gradients = FilmGradients<C, kStep>;
  static __device__ __forceinline__ void run(const BackwardRows& backward) {
    Gradients::combine(backward.args, backward.rows);
    Gradients::sum_biases(backward.args, shared_memory<C>(), backward.rows);
  }
};
template <class C>
using CombineBackward = CombineFilm<C, false>;
template <class C>
using CombineStep = CombineFilm<C, true>;

template <class C>
struct FinishFilmBackward : ElementKernel<FilmBackwardArguments, StepLosses<C>::kSharedBytes> {
  static __device__ __forceinline__ void run(const FilmBackwardArguments& args) {
    FilmGradients<C, false>::finish(args, shared_memory<C>());
  }
};
template <class C>
struct FinishFilmStep : ElementKernel<FilmStepArguments, StepLosses<C>::kSharedBytes> {
  using Step = FilmStep<C>;
  static __device__ __forceinline__ void run(const FilmStepArguments& args) {
    auto* shared = shared_memory<C>();
    if (blockIdx.x == gridDim.x - 1) Step::Losses::finish(args.step, shared);
    if (args.step.plan.gradients) Step::Gradients::finish(args.backward, shared);
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
}

/// What a step multiplies gradients with. Where a leak is open the planes are weighted, and all of
/// them have the fused branch's scale.
const StepTotals* scale_of(const Run& run, const FilmBackwardPlan& plan, int branch) {
  return run.scale(plan.weighted ? 0 : branch);
}

/// Has a product give a sum over rows: the result itself, or in float32 until the last chunk.
void sum_over_chunks(const Run& run, const FilmBackwardArguments& args, RowRange rows,
                     const Matrix& result, bool partial, int64_t offset, int64_t pitch,
                     Matmul& product) {
  product.result = partial ? accumulator(run.dtype()) : run.output();
  product.c = partial ? Matrix{at(args.workspace, offset), pitch} : result;
  product.accumulate = rows.begin > 0;
  product.scale = scale_of(run, args.plan, 0);
}

/// The products before the combine kernel: d[k] = g_k W_o, and the output's weight.
void multiply_branches(Run& run, const FilmBackwardArguments& args, RowRange rows) {
  const FilmHeadBackward& p = args.problem;
  const FilmBackwardPlan& plan = args.plan;
  const auto gradient = [&](int k) {
    if (!run.in_step() && !plan.copy_gradients) {
      return k == 0 ? p.grad_fused : p.grad_unimodal[k - 1];
    }
    return plane(args.workspace, plan.gradients_offset,
                 plan.slot[k] * rows.count * plan.padded_classes, plan.padded_classes, run.dtype());
  };
  for (int k = 0; k < 3; ++k) {
    if (!plan.need_branch[k]) continue;
    Matmul product;
    product.rows = rows.count;
    product.columns = p.head.hidden;
    product.depth = p.head.classes;
    product.a = gradient(k);
    product.b = p.head.out_weight;
    product.result = accumulator(run.dtype());
    product.c = moved(Matrix{at(args.workspace, plan.branches_offset), plan.padded_hidden},
                      k * plan.plane_rows * plan.padded_hidden, product.result);
    run.add(product);
  }
  if (!p.grad_out_weight.data) return;
  int first = 0;  // the branch in slot 0
  while (!plan.to_out_weight[first]) ++first;
  Matmul product;
  product.rows = p.head.classes;
  product.columns = p.head.hidden;
  product.depth = plan.out_branches * rows.count;
  product.a = gradient(first);
  product.a_transposed = true;
  product.b = plane(args.workspace, plan.features_offset, 0, plan.padded_hidden, run.dtype());
  sum_over_chunks(run, args, rows, p.grad_out_weight, plan.out_partials,
                  plan.out_weight_partial_offset, plan.padded_hidden, product);
  run.add(product);
}

/// And after it: the film weight, and what reaches x.
void multiply_modulation(Run& run, const FilmBackwardArguments& args, RowRange rows) {
  const FilmHeadBackward& p = args.problem;
  const FilmBackwardPlan& plan = args.plan;
  const int64_t hidden = p.head.hidden;
  for (int half = 0; half < 2 && p.grad_film_weight.data; ++half) {
    Matmul product;
    product.rows = hidden;
    product.columns = p.head.condition_width;
    product.depth = half == 1 || plan.need_branch[0] ? rows.count : 0;  // 0 * inf is NaN
    product.a = plane(args.workspace, plan.parameters_offset, half * plan.padded_hidden,
                      2 * plan.padded_hidden, run.dtype());
    product.a_transposed = true;
    product.b = plan.masked.pitch > 0
                    ? ConstMatrix{at(args.workspace, plan.masked.offset), plan.masked.pitch}
                    : moved(p.head.condition, rows.begin * p.head.condition.stride, run.dtype());
    sum_over_chunks(run, args, rows, p.grad_film_weight, plan.partials,
                    plan.film_weight_partial_offset, plan.padded_condition, product);
    product.c = moved(product.c, half * hidden * product.c.stride, product.result);
    run.add(product);
  }
  if (!p.grad_condition.data) return;
  const int64_t first_half = plan.condition_leak ? 0 : 1;
  Matmul product;
  product.rows = rows.count;
  product.columns = p.head.condition_width;
  product.depth = (2 - first_half) * hidden;
  product.a = plane(args.workspace, plan.encoder_offset, 0, plan.encoder_pitch, run.dtype());
  product.b =
      moved(p.head.film_weight, first_half * hidden * p.head.film_weight.stride, run.dtype());
  product.result = run.output();
  product.c = moved(p.grad_condition, rows.begin * p.grad_condition.stride, product.result);
  product.scale = scale_of(run, plan, 1);
  run.add(product);
}

/// The forward phases up to the products that become logits.
void run_forward(Run& run, const ForwardRows& forward) {
  multiply_film(run, forward.args, forward.rows);
  run.launch<ModulateFilm>(forward);
  multiply_head(run, forward.args, forward.rows.count);
}

}  // namespace

cudaError_t film_forward(const FilmHeadForward& problem, Precision precision,
                         const FilmForwardPlan& plan, void* workspace, const Queue& queue) {
  Run run(precision, plan.launch, queue);
  for (int64_t begin = 0; begin < problem.head.rows; begin += plan.plane_rows) {
    ForwardRows forward{{problem, plan, workspace},
                        {begin, smaller(plan.plane_rows, problem.head.rows - begin)}};
    forward.args.problem.modulation =
        moved(problem.modulation, begin * problem.modulation.stride, accumulator(precision.dtype));
    run_forward(run, forward);
    run.launch<WriteFilmLogits>(forward);
  }
  return run.flush();
}

cudaError_t film_backward(const FilmHeadBackward& problem, Precision precision,
                          const FilmBackwardPlan& plan, void* workspace, const Queue& queue) {
  const BackwardRows backward{{problem, plan, workspace}, {0, problem.head.rows}};
  Run run(precision, plan.launch, queue);
  run.launch<PrepareFilm>(backward);
  multiply_branches(run, backward.args, backward.rows);
  run.launch<CombineBackward>(backward);
  multiply_modulation(run, backward.args, backward.rows);
  run.launch<FinishFilmBackward>(backward.args);
  return run.flush();
}

cudaError_t film_step(const FilmStepArguments& arguments, Precision precision,
                      const FilmStepPlan& plan, const Queue& queue) {
  const StepContext& step = arguments.step;
  const Scales scales(step);
  Run run(precision, plan.launch, queue, &scales);
  count_rows(run, step);
  for (int chunk = 0; chunk < step.plan.chunks; ++chunk) {
    const RowRange rows = step.chunk(chunk);
    run_forward(run, {arguments.forward, rows});
    run.launch<FilmRows>(StepRows{arguments, rows});
    if (!step.plan.gradients) continue;
    multiply_branches(run, arguments.backward, rows);
    run.launch<CombineStep>(BackwardRows{arguments.backward, rows});
    multiply_modulation(run, arguments.backward, rows);
  }
  run.launch<FinishFilmStep>(arguments);
  return run.flush();
}

}  // namespace dgl_ext::library
