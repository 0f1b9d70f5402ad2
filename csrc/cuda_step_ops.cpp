// The training steps on CUDA, and the scaling of what they return.

#include "cuda_ops.h"

namespace dgl_ext {
namespace {

// Loss arguments and results of one step. The results come first in what the op returns.
class StepCall {
 public:
  StepCall(Call& call, Dtype dtype, size_t modalities, const Tensor& target,
           const OptionalTensors& present, const std::vector<double>& alpha, bool mean,
           int64_t ignore_index, double label_smoothing)
      : call_(call), gradients_(dtype) {
    const auto loss_dtype = dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
    const auto branches = static_cast<int64_t>(modalities) + 1;
    results_ = {call.empty({}, loss_dtype), call.empty({branches}, loss_dtype),
                call.empty({branches}, ScalarType::Long)};
    loss_.target = static_cast<const int64_t*>(call.packed(target));
    std::copy(alpha.begin(), alpha.end(), loss_.alpha);
    loss_.mean = mean;
    loss_.ignore_index = ignore_index;
    loss_.label_smoothing = label_smoothing;
    loss_.total = results_[0].data_ptr();
    loss_.losses = results_[1].data_ptr();
    loss_.correct = static_cast<int64_t*>(results_[2].data_ptr());
    for (size_t i = 0; i < present.size(); ++i) {
      present_[i] = static_cast<const uint8_t*>(call.vector(present[i]));
    }
  }

  const CrossEntropy& loss() const { return loss_; }
  const uint8_t* present(size_t i) const { return present_[i]; }
  std::vector<Tensor>& results() { return results_; }

  // A gradient for the caller, where it is needed; float32 for float16.
  Matrix gradient(bool needed, const Shape& shape) {
    if (!needed) return {};
    results_.push_back(gradients_ == Dtype::kFloat16 ? call_.empty(shape, ScalarType::Float)
                                                     : call_.empty(shape));
    return result_rows(results_.back());
  }
  // Columns of a gradient, from `column` on.
  Matrix slice(const Matrix& whole, int64_t column) const {
    const Dtype dtype = gradients_ == Dtype::kFloat16 ? Dtype::kFloat32 : gradients_;
    return {at_column(whole.data, column, dtype), whole.stride};
  }

 private:
  Call& call_;
  const Dtype gradients_;
  CrossEntropy loss_;
  const uint8_t* present_[kMaxModalities] = {};
  std::vector<Tensor> results_;
};

std::vector<Tensor> linear_step(std::vector<Tensor> features, std::vector<Tensor> weights,
                                OptionalTensors biases, Tensor target, OptionalTensors present,
                                std::vector<double> alpha, bool mean, int64_t ignore_index,
                                double label_smoothing, std::vector<bool> needs_features,
                                std::vector<bool> needs_weights, std::vector<bool> needs_biases,
                                double encoder_leak, double head_leak, int64_t limit,
                                bool allow_tf32, int64_t executor) {
  const Checks checks("linear_head_step", kOnCuda, true);
  checks.executor(executor);
  const Shape leading = checks.features(features, 1, kMaxModalities);
  Call call("linear_head_step", features[0]);
  const LinearArguments args = parse_linear(checks, call, features, weights);
  checks.biases(biases, weights, features[0]);
  checks.step(target, present, alpha, label_smoothing, limit, features.size(), leading,
              features[0]);
  checks.needs(needs_features, needs_weights, needs_biases, encoder_leak, head_leak,
               features.size(), weights.size());
  const Dtype dtype = dtype_of(features[0]);
  StepCall step(call, dtype, features.size(), target, present, alpha, mean, ignore_index,
                label_smoothing);

  LinearHeadStep problem;
  problem.head = args.head;
  problem.leaks = {encoder_leak, head_leak};
  problem.loss = step.loss();
  for (int i = 0; i < args.head.modalities; ++i) {
    problem.head.present[i] = step.present(i);
    problem.branch_bias[i] = call.vector(biases[args.shared ? 0 : i]);
    problem.grad_feature[i] = step.gradient(needs_features[i], shape_of(features[i]));
  }
  if (args.shared) problem.fused_bias = problem.branch_bias[0];
  for (size_t w = 0; w < weights.size(); ++w) {
    const Matrix grad = step.gradient(needs_weights[w], shape_of(weights[w]));
    const int first = args.shared ? 0 : static_cast<int>(w);
    const int last = args.shared ? args.head.modalities : first + 1;
    for (int i = first; i < last; ++i) {
      if (args.head.width[i] > 0) problem.grad_weight[i] = step.slice(grad, args.begin[i]);
    }
  }
  for (size_t b = 0; b < weights.size(); ++b) {
    void*& grad = args.shared ? problem.grad_fused_bias : problem.grad_branch_bias[b];
    grad = step.gradient(needs_biases[b], {args.head.classes}).data;
  }

  const Precision precision{dtype, allow_tf32};
  call.run(plan_linear_step, linear_head_step, problem, precision, executor,
           workspace_limit(limit));
  return step.results();
}

std::vector<Tensor> film_step(std::vector<Tensor> features, std::vector<Tensor> weights,
                              OptionalTensors biases, Tensor target, OptionalTensors present,
                              std::vector<double> alpha, bool mean, int64_t ignore_index,
                              double label_smoothing, std::vector<bool> needs_features,
                              std::vector<bool> needs_weights, std::vector<bool> needs_biases,
                              double encoder_leak, double head_leak, int64_t limit, bool allow_tf32,
                              int64_t executor) {
  const Checks checks("film_head_step", kOnCuda, true);
  checks.executor(executor);
  const Shape leading = checks.features(features, 2, 2);
  Call call("film_head_step", features[0]);
  FilmHeadStep problem;
  problem.head = parse_film(checks, call, features, weights, biases);
  checks.step(target, present, alpha, label_smoothing, limit, 2, leading, features[0]);
  checks.needs(needs_features, needs_weights, needs_biases, encoder_leak, head_leak, 2, 2);
  const Dtype dtype = dtype_of(features[0]);
  StepCall step(call, dtype, 2, target, present, alpha, mean, ignore_index, label_smoothing);

  problem.leaks = {encoder_leak, head_leak};
  problem.loss = step.loss();
  for (int i = 0; i < 2; ++i) problem.head.present[i] = step.present(i);
  problem.grad_condition = step.gradient(needs_features[0], shape_of(features[0]));
  problem.grad_target = step.gradient(needs_features[1], shape_of(features[1]));
  problem.grad_film_weight = step.gradient(needs_weights[0], shape_of(weights[0]));
  problem.grad_out_weight = step.gradient(needs_weights[1], shape_of(weights[1]));
  problem.grad_film_bias = step.gradient(needs_biases[0], {2 * problem.head.hidden}).data;
  problem.grad_out_bias = step.gradient(needs_biases[1], {problem.head.classes}).data;

  const Precision precision{dtype, allow_tf32};
  call.run(plan_film_step, film_head_step, problem, precision, executor, workspace_limit(limit));
  return step.results();
}

// ---- scaling ----

// `grads` and `scale` checked; to[i] = scale * from[i] for contiguous tensors.
void scale_all(const char* op, const std::vector<Tensor>& from, const std::vector<Tensor>& to,
               const Tensor& scale) {
  const Call call(op, from[0]);
  ScaledGradients problem;
  problem.scale = scale.const_data_ptr();
  problem.dtype = dtype_of(from[0]);
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

void check_scaling(const Checks& checks, const std::vector<Tensor>& grads, const Tensor& scale) {
  for (size_t i = 0; i < grads.size(); ++i) {
    checks.like(Checks::indexed("grads", i), grads[i], grads[0], "grads[0]");
  }
  const bool wide = !grads.empty() && grads[0].scalar_type() == ScalarType::Double;
  checks.saved("scale", scale, grads.empty() ? scale : grads[0],
               wide ? ScalarType::Double : ScalarType::Float);
  checks.shape("scale", scale, {});
}

void scale_in_place(std::vector<Tensor> grads, Tensor scale) {
  const Checks checks("scale_gradients_", kOnCuda);
  check_scaling(checks, grads, scale);
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
  check_scaling(checks, grads, scale);
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
  m.impl("linear_head_step", DGL_EXT_CUDA_OP(&linear_step));
  m.impl("film_head_step", DGL_EXT_CUDA_OP(&film_step));
  m.impl("scale_gradients_", DGL_EXT_CUDA_OP(&scale_in_place));
  m.impl("scale_gradients", DGL_EXT_CUDA_OP(&scale_copies));
}

}  // namespace dgl_ext
