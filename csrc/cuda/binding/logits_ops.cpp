// The logits ops on CUDA: tensors become structs, the plan chooses, a launcher runs. Their own
// module, so that the package loads where torch has no CUDA. The training steps are in
// step_ops.cpp.

#include <Python.h>

#include "cuda/binding/cuda_ops.h"

namespace dgl_ext {
namespace {

struct LinearForwardOp {
  static constexpr const char* kName = "linear_head_forward";
  static constexpr auto kCheck = &Checks::linear;
  static constexpr auto kPlan = plan_linear_forward;
  static constexpr auto kLaunch = linear_head_forward;
  using Problem = LinearHeadForward;
};

struct FilmForwardOp {
  static constexpr const char* kName = "film_head_forward";
  static constexpr auto kCheck = &Checks::film;
  static constexpr auto kPlan = plan_film_forward;
  static constexpr auto kLaunch = film_head_forward;
  using Problem = FilmHeadForward;
};

template <class Op>
std::vector<Tensor> forward(std::vector<Tensor> features, std::vector<Tensor> weights,
                            OptionalTensors biases, OptionalTensors present, bool allow_tf32,
                            int64_t executor) {
  const Checks checks(Op::kName, kOnCuda, true);
  checks.executor(executor);
  const auto sizes = (checks.*Op::kCheck)(features, weights);
  checks.biases(biases, weights, features[0]);
  checks.masks(present, features.size(), sizes.leading, features[0]);

  Call call(Op::kName, features[0]);
  typename Op::Problem problem;
  set_head(call, sizes, features, weights, biases, present, problem.head);
  const ScalarType dtype = features[0].scalar_type();
  Results results(call, dtype);
  problem.fused = result_rows(results.add(sizes.with(sizes.classes), dtype));
  for (size_t i = 0; i < features.size(); ++i) {
    problem.unimodal[i] = result_rows(results.add(sizes.with(sizes.classes), dtype));
  }
  if constexpr (std::is_same_v<Op, FilmForwardOp>) {
    problem.modulation =
        result_rows(results.add(sizes.with(2 * sizes.hidden), compute_dtype(dtype)));
  }
  call.run(Op::kPlan, Op::kLaunch, problem, {dtype_of(dtype), allow_tf32}, executor);
  return results.tensors;
}

std::vector<Tensor> linear_backward(OptionalTensors grad_outputs, std::vector<Tensor> features,
                                    std::vector<Tensor> weights, OptionalTensors present,
                                    std::vector<bool> needs_features,
                                    std::vector<bool> needs_weights, std::vector<bool> needs_biases,
                                    double encoder_leak, double head_leak, bool allow_tf32,
                                    int64_t executor) {
  const Checks checks("linear_head_backward", kOnCuda, true);
  checks.executor(executor);
  const LinearSizes sizes = checks.linear(features, weights);
  const Needs needs{needs_features, needs_weights, needs_biases};
  checks.grad_outputs(grad_outputs, features.size() + 1, sizes, features[0]);
  checks.needs(needs, encoder_leak, head_leak, features.size(), weights.size());
  checks.masks(present, features.size(), sizes.leading, features[0]);

  Call call("linear_head_backward", features[0]);
  LinearHeadBackward problem;
  set_head(call, sizes, features, weights, {}, present, problem.head);
  problem.leaks = {encoder_leak, head_leak};
  problem.grad_fused = call.matrix(grad_outputs[0]);
  for (int i = 0; i < problem.head.modalities; ++i) {
    problem.grad_unimodal[i] = call.matrix(grad_outputs[i + 1]);
  }
  const Precision precision{dtype_of(features[0].scalar_type()), allow_tf32};
  Results grads(call, features[0].scalar_type());
  make_gradients(grads, sizes, features, weights, needs, false, problem);
  call.run(plan_linear_backward, linear_head_backward, problem, precision, executor);
  return grads.tensors;
}

std::vector<Tensor> film_backward(OptionalTensors grad_outputs, std::vector<Tensor> features,
                                  std::vector<Tensor> weights, OptionalTensors biases, Tensor film,
                                  OptionalTensors present, std::vector<bool> needs_features,
                                  std::vector<bool> needs_weights, std::vector<bool> needs_biases,
                                  double encoder_leak, double head_leak, bool allow_tf32,
                                  int64_t executor) {
  const Checks checks("film_head_backward", kOnCuda, true);
  checks.executor(executor);
  const FilmSizes sizes = checks.film(features, weights);
  const Needs needs{needs_features, needs_weights, needs_biases};
  const ScalarType dtype = features[0].scalar_type();
  checks.biases(biases, weights, features[0]);
  checks.grad_outputs(grad_outputs, 3, sizes, features[0]);
  checks.needs(needs, encoder_leak, head_leak, 2, 2);
  checks.masks(present, features.size(), sizes.leading, features[0]);
  checks.of_dtype("film", film, compute_dtype(dtype), sizes.with(2 * sizes.hidden), features[0]);

  Call call("film_head_backward", features[0]);
  FilmHeadBackward problem;
  set_head(call, sizes, features, weights, biases, present, problem.head);
  problem.leaks = {encoder_leak, head_leak};
  problem.modulation = call.matrix(film);
  problem.grad_fused = call.matrix(grad_outputs[0]);
  for (int k = 0; k < 2; ++k) problem.grad_unimodal[k] = call.matrix(grad_outputs[k + 1]);
  Results grads(call, dtype);
  make_gradients(grads, sizes, features, weights, needs, false, problem);
  const Precision precision{dtype_of(features[0].scalar_type()), allow_tf32};
  call.run(plan_film_backward, film_head_backward, problem, precision, executor);
  return grads.tensors;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgl_ext, DGL_EXT_DISPATCH_KEY, m) {
  m.impl(LinearForwardOp::kName, DGL_EXT_CUDA_OP(&forward<LinearForwardOp>));
  m.impl("linear_head_backward", DGL_EXT_CUDA_OP(&linear_backward));
  m.impl(FilmForwardOp::kName, DGL_EXT_CUDA_OP(&forward<FilmForwardOp>));
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
