// The logits ops on CUDA: tensors become structs, the plan chooses, a launcher runs. Their own
// module, so that the package loads where torch has no CUDA. The training steps are in
// cuda_step_ops.cpp.

#include "cuda_ops.h"

#include <Python.h>

namespace dgl_ext {
namespace {

void set_masks(Call& call, const OptionalTensors& present, const uint8_t** masks) {
  for (size_t i = 0; i < present.size(); ++i) {
    masks[i] = static_cast<const uint8_t*>(call.vector(present[i]));
  }
}

// ---- concat and sum ----

std::vector<Tensor> linear_forward(std::vector<Tensor> features, std::vector<Tensor> weights,
                                   OptionalTensors biases, OptionalTensors present, bool allow_tf32,
                                   int64_t executor) {
  const Checks checks("linear_head_forward", kOnCuda, true);
  checks.executor(executor);
  Shape shape = checks.features(features, 1, kMaxModalities);
  Call call("linear_head_forward", features[0]);
  const LinearArguments args = parse_linear(checks, call, features, weights);
  checks.biases(biases, weights, features[0]);
  checks.masks(present, features.size(), shape, features[0]);

  LinearHeadForward problem;
  problem.head = args.head;
  set_masks(call, present, problem.head.present);
  for (int i = 0; i < args.head.modalities; ++i) {
    problem.branch_bias[i] = call.vector(biases[args.shared ? 0 : i]);
  }
  if (args.shared) problem.fused_bias = problem.branch_bias[0];
  shape.push_back(args.head.classes);
  std::vector<Tensor> logits;  // fused first
  for (int i = 0; i <= args.head.modalities; ++i) logits.push_back(call.empty(shape));
  problem.fused = result_rows(logits[0]);
  for (int i = 0; i < args.head.modalities; ++i) problem.unimodal[i] = result_rows(logits[i + 1]);

  const Precision precision{dtype_of(features[0]), allow_tf32};
  call.run(plan_linear_forward, linear_head_forward, problem, precision, executor);
  return logits;
}

std::vector<Tensor> linear_backward(OptionalTensors grad_outputs, std::vector<Tensor> features,
                                    std::vector<Tensor> weights, OptionalTensors present,
                                    std::vector<bool> needs_features,
                                    std::vector<bool> needs_weights, std::vector<bool> needs_biases,
                                    double encoder_leak, double head_leak, bool allow_tf32,
                                    int64_t executor) {
  const Checks checks("linear_head_backward", kOnCuda, true);
  checks.executor(executor);
  const Shape leading = checks.features(features, 1, kMaxModalities);
  Call call("linear_head_backward", features[0]);
  const LinearArguments args = parse_linear(checks, call, features, weights);
  const LinearHead& head = args.head;
  checks.grad_outputs(grad_outputs, features.size() + 1, leading, head.classes, features[0]);
  checks.needs(needs_features, needs_weights, needs_biases, encoder_leak, head_leak,
               features.size(), weights.size());
  checks.masks(present, features.size(), leading, features[0]);

  const Dtype dtype = dtype_of(features[0]);
  LinearHeadBackward problem;
  problem.head = head;
  set_masks(call, present, problem.head.present);
  problem.leaks = {encoder_leak, head_leak};
  problem.grad_fused = call.matrix(grad_outputs[0]);
  for (int i = 0; i < head.modalities; ++i) {
    problem.grad_unimodal[i] = call.matrix(grad_outputs[i + 1]);
  }

  // What no gradient reaches is zero here; autograd.py does not ask for it.
  std::vector<Tensor> results;
  const auto result = [&](const Shape& shape, bool flows) {
    results.push_back(call.empty(shape));
    if (!flows) torch::stable::zero_(results.back());
    return result_rows(results.back());
  };
  for (int i = 0; i < head.modalities; ++i) {
    if (!needs_features[i]) continue;
    const bool flows = feature_flows(problem, i);
    const Matrix grad = result(shape_of(features[i]), flows);
    if (flows) problem.grad_feature[i] = grad;
  }
  for (size_t w = 0; w < weights.size(); ++w) {
    if (!needs_weights[w]) continue;
    const int first = args.shared ? 0 : static_cast<int>(w);
    const int last = args.shared ? head.modalities : first + 1;
    bool all_flow = true;
    for (int i = first; i < last; ++i) all_flow = all_flow && weight_flows(problem, i);
    const Matrix grad = result(shape_of(weights[w]), all_flow);
    for (int i = first; i < last; ++i) {
      if (head.width[i] == 0 || !weight_flows(problem, i)) continue;
      problem.grad_weight[i] = {at_column(grad.data, args.begin[i], dtype), grad.stride};
    }
  }
  for (size_t b = 0; b < weights.size(); ++b) {
    if (!needs_biases[b]) continue;
    const int i = static_cast<int>(b);
    const bool flows = args.shared ? fused_bias_flows(problem) : weight_flows(problem, i);
    const Matrix grad = result({head.classes}, flows);
    void*& target = args.shared ? problem.grad_fused_bias : problem.grad_branch_bias[i];
    if (flows) target = grad.data;
  }

  const Precision precision{dtype, allow_tf32};
  call.run(plan_linear_backward, linear_head_backward, problem, precision, executor);
  return results;
}

// ---- FiLM ----

std::vector<Tensor> film_forward(std::vector<Tensor> features, std::vector<Tensor> weights,
                                 OptionalTensors biases, OptionalTensors present, bool allow_tf32,
                                 int64_t executor) {
  const Checks checks("film_head_forward", kOnCuda, true);
  checks.executor(executor);
  const Shape leading = checks.features(features, 2, 2);
  Call call("film_head_forward", features[0]);
  FilmHeadForward problem;
  problem.head = parse_film(checks, call, features, weights, biases);
  checks.masks(present, features.size(), leading, features[0]);
  set_masks(call, present, problem.head.present);

  const auto shape = [&](int64_t columns) {
    Shape full = leading;
    full.push_back(columns);
    return full;
  };
  const Dtype dtype = dtype_of(features[0]);
  std::vector<Tensor> results;
  for (int k = 0; k < 3; ++k) results.push_back(call.empty(shape(problem.head.classes)));
  results.push_back(call.empty(shape(2 * problem.head.hidden),
                               dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float));
  problem.fused = result_rows(results[0]);
  problem.unimodal[0] = result_rows(results[1]);
  problem.unimodal[1] = result_rows(results[2]);
  problem.modulation = result_rows(results[3]);

  const Precision precision{dtype, allow_tf32};
  call.run(plan_film_forward, film_head_forward, problem, precision, executor);
  return results;
}

std::vector<Tensor> film_backward(OptionalTensors grad_outputs, std::vector<Tensor> features,
                                  std::vector<Tensor> weights, OptionalTensors biases, Tensor film,
                                  OptionalTensors present, std::vector<bool> needs_features,
                                  std::vector<bool> needs_weights, std::vector<bool> needs_biases,
                                  double encoder_leak, double head_leak, bool allow_tf32,
                                  int64_t executor) {
  const Checks checks("film_head_backward", kOnCuda, true);
  checks.executor(executor);
  const Shape leading = checks.features(features, 2, 2);
  Call call("film_head_backward", features[0]);
  FilmHeadBackward problem;
  problem.head = parse_film(checks, call, features, weights, biases);
  checks.grad_outputs(grad_outputs, 3, leading, problem.head.classes, features[0]);
  checks.needs(needs_features, needs_weights, needs_biases, encoder_leak, head_leak, 2, 2);
  checks.masks(present, features.size(), leading, features[0]);
  set_masks(call, present, problem.head.present);
  Shape film_shape = leading;
  film_shape.push_back(2 * problem.head.hidden);
  checks.shape("film", film, film_shape);
  const Dtype dtype = dtype_of(features[0]);
  const ScalarType saved = dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  checks.saved("film", film, features[0], saved);
  problem.leaks = {encoder_leak, head_leak};
  problem.modulation = call.matrix(film);
  problem.grad_fused = call.matrix(grad_outputs[0]);
  for (int k = 0; k < 2; ++k) problem.grad_unimodal[k] = call.matrix(grad_outputs[k + 1]);

  // What no gradient reaches is zero here; autograd.py does not ask for it.
  std::vector<Tensor> results;
  const auto result = [&](bool needed, const Shape& shape, bool flows) {
    if (!needed) return Matrix{};
    results.push_back(call.empty(shape));
    if (!flows) torch::stable::zero_(results.back());
    return flows ? result_rows(results.back()) : Matrix{};
  };
  const bool flows = parameters_flow(problem);
  problem.grad_condition =
      result(needs_features[0], shape_of(features[0]), condition_flows(problem));
  problem.grad_target = result(needs_features[1], shape_of(features[1]), target_flows(problem));
  problem.grad_film_weight =
      result(needs_weights[0], shape_of(weights[0]), film_weight_flows(problem));
  problem.grad_out_weight = result(needs_weights[1], shape_of(weights[1]), flows);
  problem.grad_film_bias = result(needs_biases[0], {2 * problem.head.hidden}, flows).data;
  problem.grad_out_bias = result(needs_biases[1], {problem.head.classes}, flows).data;

  const Precision precision{dtype, allow_tf32};
  call.run(plan_film_backward, film_head_backward, problem, precision, executor);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgl_ext, DGL_EXT_DISPATCH_KEY, m) {
  m.impl("linear_head_forward", DGL_EXT_CUDA_OP(&linear_forward));
  m.impl("linear_head_backward", DGL_EXT_CUDA_OP(&linear_backward));
  m.impl("film_head_forward", DGL_EXT_CUDA_OP(&film_forward));
  m.impl("film_head_backward", DGL_EXT_CUDA_OP(&film_backward));
}

}  // namespace dgl_ext

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "dgl_ext._C_cuda",
                               nullptr,
                               0,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
