// The training steps on CUDA, and the scaling of what they return.

#include "cuda/binding/cuda_ops.h"

namespace dgl_ext {
namespace {

struct LinearStepOp {
  static constexpr const char* kName = "linear_head_step";
  static constexpr auto kCheck = &Checks::linear;
  static constexpr auto kPlan = plan_linear_step;
  static constexpr auto kLaunch = linear_head_step;
  using Problem = LinearHeadStep;
};

struct FilmStepOp {
  static constexpr const char* kName = "film_head_step";
  static constexpr auto kCheck = &Checks::film;
  static constexpr auto kPlan = plan_film_step;
  static constexpr auto kLaunch = film_head_step;
  using Problem = FilmHeadStep;
};

template <class Op>
std::vector<Tensor> step(std::vector<Tensor> features, std::vector<Tensor> weights,
                         OptionalTensors biases, Tensor target, std::optional<Tensor> class_weight,
                         std::optional<Tensor> sample_weight, OptionalTensors present,
                         std::vector<double> alpha, bool mean, int64_t ignore_index,
                         double label_smoothing, std::vector<bool> needs_features,
                         std::vector<bool> needs_weights, std::vector<bool> needs_biases,
                         double encoder_leak, double head_leak, int64_t limit, bool allow_tf32,
                         int64_t executor) {
  const Checks checks(Op::kName, kOnCuda, true);
  checks.executor(executor);
  const auto sizes = (checks.*Op::kCheck)(features, weights);
  const Needs needs{needs_features, needs_weights, needs_biases};
  checks.biases(biases, weights, features[0]);
  checks.step({target, class_weight, sample_weight}, present, alpha, label_smoothing, limit,
              features.size(), sizes, features[0]);
  checks.needs(needs, encoder_leak, head_leak, features.size(), weights.size());

  Call call(Op::kName, features[0]);
  typename Op::Problem problem;
  set_head(call, sizes, features, weights, biases, present, problem.head);
  problem.leaks = {encoder_leak, head_leak};
  const ScalarType dtype = features[0].scalar_type();
  const auto branches = static_cast<int64_t>(features.size()) + 1;
  // float32 for float16, whose gradients have yet to meet that of the total
  Results results(call, dtype == ScalarType::Half ? ScalarType::Float : dtype);
  CrossEntropy& loss = problem.loss;
  loss.total = results.add({}, compute_dtype(dtype)).data_ptr();
  loss.branch_losses = results.add({branches}, compute_dtype(dtype)).data_ptr();
  Shape per_row = sizes.leading;
  per_row.insert(per_row.begin(), branches);
  loss.correct = results.add_indices({branches});
  loss.counted = results.add_indices({branches});
  loss.losses = results.add(per_row, compute_dtype(dtype)).data_ptr();
  loss.predictions = results.add_indices(per_row);
  if (target.scalar_type() == ScalarType::Long) {
    loss.target = static_cast<const int64_t*>(call.packed(target));
  } else {
    loss.soft_target = call.matrix(target);
    loss.soft_dtype = dtype_of(target.scalar_type());
  }
  loss.class_weight = call.vector(class_weight);
  loss.sample_weight = call.vector(sample_weight);
  std::copy(alpha.begin(), alpha.end(), loss.alpha);
  loss.mean = mean;
  loss.ignore_index = ignore_index;
  loss.label_smoothing = label_smoothing;
  make_gradients(results, sizes, features, weights, needs, true, problem);
  const Precision precision{dtype_of(dtype), allow_tf32};
  call.run(Op::kPlan, Op::kLaunch, problem, precision, executor, workspace_limit(limit));
  return results.tensors;
}

// ---- scaling ----

// `grads` and `scale` checked; to[i] = scale * from[i] for contiguous tensors.
void scale_all(const char* op, const std::vector<Tensor>& from, const std::vector<Tensor>& to,
               const Tensor& scale) {
  const Call call(op, from[0]);
  ScaledGradients problem;
  problem.scale = scale.const_data_ptr();
  problem.dtype = dtype_of(from[0].scalar_type());
  problem.to_float16 = from[0].scalar_type() != to[0].scalar_type();
  const auto launch = [&] {
    if (problem.count == 0) return;
    check(op, scale_gradients(problem, call.device(), call.stream()), "launching");
    problem.count = 0;
  };
  for (size_t i = 0; i < from.size(); ++i) {
    if (from[i].numel() == 0) continue;
    problem.from[problem.count] = from[i].const_data_ptr();
    problem.to[problem.count] = to[i].data_ptr();
    problem.size[problem.count++] = from[i].numel();
    if (problem.count == kMaxScaled) launch();
  }
  launch();
}

void scale_in_place(std::vector<Tensor> grads, Tensor scale) {
  const Checks checks("scale_gradients_", kOnCuda);
  checks.scaling(grads, scale);
  if (grads.empty()) return;
  std::vector<Tensor> values;
  for (const Tensor& grad : grads) values.push_back(torch::stable::contiguous(grad));
  scale_all("scale_gradients_", values, values, scale);
  for (size_t i = 0; i < grads.size(); ++i) {
    if (!grads[i].is_contiguous()) torch::stable::copy_(grads[i], values[i]);
  }
}

std::vector<Tensor> scale_copies(std::vector<Tensor> grads, Tensor scale, bool to_float16) {
  const Checks checks("scale_gradients", kOnCuda);
  checks.scaling(grads, scale);
  std::vector<Tensor> results;
  if (grads.empty()) return results;
  const Call call("scale_gradients", grads[0]);
  for (size_t i = 0; i < grads.size(); ++i) {
    const ScalarType dtype = grads[i].scalar_type();
    if (to_float16 && dtype != ScalarType::Float) {
      checks.fail(Checks::indexed("grads", i), "float32 to round to float16", dtype_name(dtype));
    }
    grads[i] = torch::stable::contiguous(grads[i]);
    results.push_back(call.empty(shape_of(grads[i]), to_float16 ? ScalarType::Half : dtype));
  }
  scale_all("scale_gradients", grads, results, scale);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgl_ext, DGL_EXT_DISPATCH_KEY, m) {
  m.impl(LinearStepOp::kName, DGL_EXT_CUDA_OP(&step<LinearStepOp>));
  m.impl(FilmStepOp::kName, DGL_EXT_CUDA_OP(&step<FilmStepOp>));
  m.impl("scale_gradients_", DGL_EXT_CUDA_OP(&scale_in_place));
  m.impl("scale_gradients", DGL_EXT_CUDA_OP(&scale_copies));
}

}  // namespace dgl_ext
