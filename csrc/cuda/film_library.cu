// The library executor of FiLM: its phases (film_forward.cuh, film_gradients.cuh) as launches of
// their own, with cuBLAS between them.
#include "film_backward.cuh"
#include "film_library.h"
#include "film_step.cuh"
#include "library.cuh"

namespace dgl_ext::library {
namespace {

template <class C>
__device__ __forceinline__ typename C::T* shared_memory() {
  return reinterpret_cast<typename C::T*>(dynamic_shared_memory());
}

struct ForwardArguments {
  FilmForwardArguments forward;
  RowRange rows;
};
template <class C>
struct ModulateFilm {
  using Arguments = ForwardArguments;
  static constexpr int kSharedBytes = 0;
  static void count_tiles(Arguments&) {}
  static __device__ __forceinline__ void run(const Arguments& args) {
    FilmForward<C>::modulate(args.forward, args.rows);
  }
};
template <class C>
struct WriteFilmLogits {
  using Arguments = ForwardArguments;
  static constexpr int kSharedBytes = 0;
  static void count_tiles(Arguments&) {}
  static __device__ __forceinline__ void run(const Arguments& args) {
    FilmForward<C>::write_logits(args.forward, args.rows);
  }
};

struct RowsArguments {
  FilmStepArguments step;
  int chunk;
};
template <class C>
struct FilmRows {
  using Arguments = RowsArguments;
  using Step = FilmStep<C>;
  static constexpr int kSharedBytes = StepLosses<C>::kSharedBytes;
  static void count_tiles(Arguments&) {}
  static __device__ __forceinline__ void run(const Arguments& args) {
    auto* shared = shared_memory<C>();
    const StepContext step = Step::context(args.step);
    const RowRange rows = Step::chunk_of(args.step, args.chunk);
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
struct PrepareFilm {
  using Arguments = BackwardArguments;
  static constexpr int kSharedBytes = 0;
  static void count_tiles(Arguments&) {}
  static __device__ __forceinline__ void run(const Arguments& args) {
    FilmGradients<C, false>::copy_gradients(args.backward, args.rows);
    FilmGradients<C, false>::prepare_features(args.backward, args.rows);
  }
};
template <class C, bool kStep>
struct CombineFilm {
  using Arguments = BackwardArguments;
  using Gradients = FilmGradients<C, kStep>;
  static constexpr int kSharedBytes = StepLosses<C>::kSharedBytes;
  static void count_tiles(Arguments&) {}
  static __device__ __forceinline__ void run(const Arguments& args) {
    Gradients::combine(args.backward, args.rows);
    Gradients::sum_biases(args.backward, shared_memory<C>(), args.rows);
  }
};
template <class C>
using CombineBackward = CombineFilm<C, false>;
template <class C>
using CombineStep = CombineFilm<C, true>;

template <class C>
struct FinishFilmBackward {
  using Arguments = FilmBackwardArguments;
  static constexpr int kSharedBytes = StepLosses<C>::kSharedBytes;
  static void count_tiles(Arguments&) {}
  static __device__ __forceinline__ void run(const Arguments& args) {
    const FilmHeadBackward& p = args.problem;
    FilmGradients<C, false>::add_bias_splits(args, shared_memory<C>(), 1);
    clear_absent<C, typename C::T>(p.grad_condition, p.head.rows, p.head.condition_width,
                                   p.head.present[0]);
  }
};
template <class C>
struct FinishFilmStep {
  using Arguments = FilmStepArguments;
  using Step = FilmStep<C>;
  using Gradients = typename Step::Gradients;
  static constexpr int kSharedBytes = StepLosses<C>::kSharedBytes;
  static void count_tiles(Arguments&) {}
  static __device__ __forceinline__ void run(const Arguments& args) {
    auto* shared = shared_memory<C>();
    const FilmHeadBackward& p = args.backward.problem;
    const StepContext step = Step::context(args);
    if (blockIdx.x == gridDim.x - 1) Step::Losses::finish(step, shared);
    if (!step.plan.gradients) return;
    Gradients::add_weight_splits(args.backward);
    Gradients::add_bias_splits(args.backward, shared, Gradients::scale_of(args.backward, 0));
    clear_absent<C, typename Gradients::Output>(p.grad_condition, p.head.rows,
                                                p.head.condition_width, p.head.present[0]);
  }
};

int64_t padded(int64_t columns) { return round_up(columns, 8); }

/// [gamma|beta] of rows [begin, begin + count), as partial sums.
cudaError_t multiply_film(const FilmHead& head, const FilmForwardPlan& plan, Precision precision,
                          void* workspace, int64_t begin, int64_t count, const Queue& queue) {
  Products products(queue, precision);
  for (int half = 0; half < 2; ++half) {
    Matmul product;
    product.rows = count;
    product.columns = head.hidden;
    product.depth = head.condition_width;
    product.a = moved(head.condition, begin * head.condition.stride, precision.dtype);
    product.b =
        moved(head.film_weight, half * head.hidden * head.film_weight.stride, precision.dtype);
    product.b_transposed = true;
    product.result = accumulator(precision.dtype);
    product.c =
        moved(Matrix{workspace, 2 * plan.padded_hidden}, half * plan.padded_hidden, product.result);
    products.add(product);
  }
  return products.run();
}

/// Logits of the three branches of `count` rows, without their bias.
cudaError_t multiply_head(const FilmHead& head, const FilmForwardPlan& plan, Precision precision,
                          void* workspace, int64_t count, const Queue& queue) {
  Products products(queue, precision);
  for (int k = 0; k < 3; ++k) {
    Matmul product;
    product.rows = count;
    product.columns = head.classes;
    product.depth = head.hidden;
    product.a = plane(workspace, plan.features_offset, k * plan.plane_rows * plan.padded_hidden,
                      plan.padded_hidden, precision.dtype);
    product.b = head.out_weight;
    product.b_transposed = true;
    product.result = accumulator(precision.dtype);
    product.c = moved(Matrix{at(workspace, plan.head_partial_offset), plan.padded_classes},
                      k * plan.plane_rows * plan.padded_classes, product.result);
    products.add(product);
  }
  return products.run();
}

/// The products of the gradients.
class Gradients {
 public:
  Gradients(const FilmHeadBackward& problem, const FilmBackwardPlan& plan, Precision precision,
            void* workspace, const Queue& queue, const Scales* scales)
      : p_(problem),
        plan_(plan),
        dtype_(precision.dtype),
        workspace_(workspace),
        scales_(scales),
        products_(queue, precision, scales ? scales->constants() : nullptr),
        output_(scales ? step_output(dtype_) : dtype_) {}

  /// Before the combine kernel: d[k] = g_k W_o, and the output's weight.
  cudaError_t run_head(int64_t begin, int64_t count) {
    for (int k = 0; k < 3; ++k) {
      if (!plan_.need_branch[k]) continue;
      Matmul product;
      product.rows = count;
      product.columns = p_.head.hidden;
      product.depth = p_.head.classes;
      product.a = gradient(k, count);
      product.b = p_.head.out_weight;
      product.result = accumulator(dtype_);
      product.c = moved(Matrix{at(workspace_, plan_.branches_offset), plan_.padded_hidden},
                        k * plan_.plane_rows * plan_.padded_hidden, product.result);
      products_.add(product);
    }
    const cudaError_t status = products_.run();
    if (status != cudaSuccess || !p_.grad_out_weight.data) return status;
    int first = 0;  // the branch in slot 0
    while (!plan_.to_out_weight[first]) ++first;
    Matmul product;
    product.rows = p_.head.classes;
    product.columns = p_.head.hidden;
    product.depth = plan_.out_branches * count;
    product.a = gradient(first, count);
    product.a_transposed = true;
    product.b = plane(workspace_, plan_.features_offset, 0, plan_.padded_hidden, dtype_);
    sum_over_chunks(product, begin, p_.grad_out_weight, plan_.out_partials,
                    plan_.out_weight_partial_offset, plan_.padded_hidden);
    products_.add(product);
    return products_.run();
  }

  /// After it: the film weight, and what reaches x.
  cudaError_t run_film(int64_t begin, int64_t count) {
    const int64_t hidden = p_.head.hidden;
    for (int half = 0; half < 2 && p_.grad_film_weight.data; ++half) {
      Matmul product;
      product.rows = hidden;
      product.columns = p_.head.condition_width;
      product.depth = count;
      product.a = plane(workspace_, plan_.parameters_offset, half * plan_.padded_hidden,
                        2 * plan_.padded_hidden, dtype_);
      product.a_transposed = true;
      product.b = plan_.masked.pitch > 0
                      ? plane(workspace_, plan_.masked.offset, 0, plan_.masked.pitch, dtype_)
                      : moved(p_.head.condition, begin * p_.head.condition.stride, dtype_);
      sum_over_chunks(product, begin, p_.grad_film_weight, plan_.partials,
                      plan_.film_weight_partial_offset, padded(p_.head.condition_width));
      product.c = moved(product.c, half * hidden * product.c.stride, product.result);
      products_.add(product);
    }
    const cudaError_t status = products_.run();
    if (status != cudaSuccess || !p_.grad_condition.data) return status;
    const int64_t first_half = plan_.condition_leak ? 0 : 1;
    Matmul product;
    product.rows = count;
    product.columns = p_.head.condition_width;
    product.depth = (2 - first_half) * hidden;
    product.a = plane(workspace_, plan_.encoder_offset, 0, plan_.encoder_pitch, dtype_);
    product.b =
        moved(p_.head.film_weight, first_half * hidden * p_.head.film_weight.stride, dtype_);
    product.c = moved(p_.grad_condition, begin * p_.grad_condition.stride, output_);
    product.result = output_;
    product.scale = scale(1);
    products_.add(product);
    return products_.run();
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
  void sum_over_chunks(Matmul& product, int64_t begin, const Matrix& result, bool partial,
                       int64_t offset, int64_t pitch) const {
    product.result = partial ? accumulator(dtype_) : output_;
    product.c = partial ? Matrix{at(workspace_, offset), pitch} : result;
    product.accumulate = begin > 0;
    product.scale = scale(0);
  }

  const FilmHeadBackward& p_;
  const FilmBackwardPlan& plan_;
  const Dtype dtype_;
  void* const workspace_;
  const Scales* const scales_;
  Products products_;
  const Dtype output_;
};

}  // namespace

cudaError_t film_forward(const FilmHeadForward& problem, Precision precision,
                         const FilmForwardPlan& plan, void* workspace, const Queue& queue) {
  const FilmHead& head = problem.head;
  const Dtype sums = accumulator(precision.dtype);
  ForwardArguments arguments{{problem, plan, workspace}, {}};
  cudaError_t status = cudaSuccess;
  for (int64_t begin = 0; begin < head.rows && status == cudaSuccess; begin += plan.plane_rows) {
    const int64_t count = smaller(plan.plane_rows, head.rows - begin);
    arguments.rows = {begin, count};
    arguments.forward.problem.modulation =
        moved(problem.modulation, begin * problem.modulation.stride, sums);
    status = multiply_film(head, plan, precision, workspace, begin, count, queue);
    if (status != cudaSuccess) break;
    status = launch_head<ModulateFilm>(ElementConfigs{}, precision.dtype, plan.launch, arguments,
                                       queue.stream);
    if (status != cudaSuccess) break;
    status = multiply_head(head, plan, precision, workspace, count, queue);
    if (status != cudaSuccess) break;
    status = launch_head<WriteFilmLogits>(ElementConfigs{}, precision.dtype, plan.launch, arguments,
                                          queue.stream);
  }
  return status;
}

cudaError_t film_backward(const FilmHeadBackward& problem, Precision precision,
                          const FilmBackwardPlan& plan, void* workspace, const Queue& queue) {
  const int64_t rows = problem.head.rows;
  const BackwardArguments arguments{{problem, plan, workspace}, {0, rows}};
  cudaError_t status = launch_head<PrepareFilm>(ElementConfigs{}, precision.dtype, plan.launch,
                                                arguments, queue.stream);
  if (status != cudaSuccess) return status;
  Gradients gradients(problem, plan, precision, workspace, queue, nullptr);
  status = gradients.run_head(0, rows);
  if (status != cudaSuccess) return status;
  status = launch_head<CombineBackward>(ElementConfigs{}, precision.dtype, plan.launch, arguments,
                                        queue.stream);
  if (status != cudaSuccess) return status;
  status = gradients.run_film(0, rows);
  if (status != cudaSuccess) return status;
  return launch_head<FinishFilmBackward>(ElementConfigs{}, precision.dtype, plan.launch,
                                         arguments.backward, queue.stream);
}

cudaError_t film_step(const FilmStepArguments& arguments, Precision precision,
                      const FilmStepPlan& plan, const Queue& queue) {
  const FilmHead& head = arguments.forward.problem.head;
  void* const workspace = arguments.forward.workspace;
  const Scales scales(workspace, plan.step, arguments.loss, head.present);
  Gradients gradients(arguments.backward.problem, plan.backward, precision, workspace, queue,
                      &scales);
  cudaError_t status = cudaSuccess;
  if (plan.step.count_first) {
    status = launch_head<CountRows>(ElementConfigs{}, precision.dtype, plan.launch,
                                    count_arguments(head, arguments.loss, plan.step, workspace),
                                    queue.stream);
  }
  for (int chunk = 0; chunk < plan.step.chunks && status == cudaSuccess; ++chunk) {
    const int64_t begin = chunk * plan.step.chunk_rows;
    const int64_t count = smaller(plan.step.chunk_rows, head.rows - begin);
    const ForwardArguments forward{arguments.forward, {begin, count}};
    const BackwardArguments backward{arguments.backward, {begin, count}};
    status = multiply_film(head, plan.forward, precision, workspace, begin, count, queue);
    if (status != cudaSuccess) break;
    status = launch_head<ModulateFilm>(ElementConfigs{}, precision.dtype, plan.launch, forward,
                                       queue.stream);
    if (status != cudaSuccess) break;
    status = multiply_head(head, plan.forward, precision, workspace, count, queue);
    if (status != cudaSuccess) break;
    status = launch_head<FilmRows>(ElementConfigs{}, precision.dtype, plan.launch,
                                   RowsArguments{arguments, chunk}, queue.stream);
    if (status != cudaSuccess || !plan.step.gradients) continue;
    status = gradients.run_head(begin, count);
    if (status != cudaSuccess) break;
    status = launch_head<CombineStep>(ElementConfigs{}, precision.dtype, plan.launch, backward,
                                      queue.stream);
    if (status == cudaSuccess) status = gradients.run_film(begin, count);
  }
  if (status != cudaSuccess) return status;
  return launch_head<FinishFilmStep>(ElementConfigs{}, precision.dtype, plan.launch, arguments,
                                     queue.stream);
}

}  // namespace dgl_ext::library
