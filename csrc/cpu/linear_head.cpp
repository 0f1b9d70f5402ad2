// The linear head (concat and sum) on the CPU: 2 units of work forward and 4 backward for two
// modalities, as products on views of the weight, without a cat and without zero blocks.
//
// concat and sum are one head here. They differ in where a modality's weight lies (columns of one
// weight, or a weight of its own) and in whose bias a modality's logits get (the shared one, or its
// own); the fused logits are the sum of the same products either way.

#include "cpu/linear_head.h"

#include <torch/csrc/stable/library.h>

#include "cpu/present.h"

namespace dgl_ext::cpu {
namespace {

Masks select_present_features(const Checks& checks, const OptionalTensors& present,
                              LinearArguments& head, const Tensor& like) {
  checks.masks(present, head.features.size(), head.leading, like);
  Masks masks(present, head.modalities(), head.rows);
  for (int64_t i = 0; i < head.modalities(); ++i) {
    head.features[i] = select_present(head.features[i], masks[i]);
  }
  return masks;
}

std::vector<Tensor> forward(std::vector<Tensor> features, std::vector<Tensor> weights,
                            OptionalTensors biases, OptionalTensors present, bool /* allow_tf32 */,
                            int64_t executor) {
  const Checks checks("linear_head_forward");
  checks.executor(executor);
  LinearArguments head = parse_linear_head(checks, features, weights);
  checks.biases(biases, weights, features[0]);
  select_present_features(checks, present, head, features[0]);

  std::vector<Tensor> logits;  // fused first
  std::vector<MatrixView> partials;
  logits.push_back(empty_cpu(head.with(head.classes), head.compute));
  for (int64_t i = 0; i < head.modalities(); ++i) {
    logits.push_back(empty_cpu(head.with(head.classes), head.compute));
    partials.push_back(
        linear(head.features[i], head.weights[i], MatrixView::from_rows(logits.back())));
  }

  std::vector<Tensor> bias_rows;
  for (const auto& bias : biases) {
    bias_rows.push_back(bias_or_zeros(bias, head.classes, head.compute));
  }
  dispatch_dtype(head.compute, [&](auto type) {
    using T = decltype(type);
    std::vector<LogitsBranch<T>> branches;
    for (int64_t i = 0; i < head.modalities(); ++i) {
      const Tensor& bias = bias_rows[head.shared ? 0 : i];
      branches.push_back({partials[i].strided<T>(), static_cast<const T*>(bias.const_data_ptr()),
                          static_cast<T*>(logits[i + 1].data_ptr())});
    }
    std::vector<T> fused_bias(head.classes, T(0));
    for (const Tensor& bias : bias_rows) {
      const T* data = static_cast<const T*>(bias.const_data_ptr());
      for (int64_t c = 0; c < head.classes; ++c) fused_bias[c] += data[c];
    }
    T* fused = static_cast<T*>(logits[0].data_ptr());
    parallel_ranges(head.rows, head.classes * head.modalities(), [&](int64_t begin, int64_t end) {
      combine_logits<T>(begin, end, head.classes, branches.data(), head.modalities(),
                        fused_bias.data(), fused);
    });
  });
  return to_storage(std::move(logits), head.storage);
}

std::vector<Tensor> backward(OptionalTensors grad_outputs, std::vector<Tensor> features,
                             std::vector<Tensor> weights, OptionalTensors present,
                             std::vector<bool> needs_features, std::vector<bool> needs_weights,
                             std::vector<bool> needs_biases, double encoder_leak, double head_leak,
                             bool /* allow_tf32 */, int64_t executor) {
  const Checks checks("linear_head_backward");
  checks.executor(executor);
  LinearArguments head = parse_linear_head(checks, features, weights);
  const Needs needs{needs_features, needs_weights, needs_biases};
  checks.grad_outputs(grad_outputs, features.size() + 1, head, features[0]);
  checks.needs(needs, encoder_leak, head_leak, features.size(), weights.size());
  const Masks masks = select_present_features(checks, present, head, features[0]);

  std::vector<std::optional<MatrixView>> grads;  // of the logits, fused first
  for (const auto& grad : grad_outputs) {
    grads.push_back(grad ? std::optional(MatrixView::from_rows(to_compute(*grad))) : std::nullopt);
  }
  const std::optional<MatrixView>& grad_fused = grads[0];
  std::vector<Tensor> results;

  // grad h_i = (g_i + encoder_leak g) W_i
  for (int64_t i = 0; i < head.modalities(); ++i) {
    if (!needs.features[i]) continue;
    results.push_back(empty_cpu(shape_of(features[i]), head.compute));
    const MatrixView residual = mixed({{grads[i + 1], 1}, {grad_fused, encoder_leak}}, head.rows,
                                      head.classes, head.compute);
    const MatrixView grad = MatrixView::from_rows(results.back());
    matmul(residual, head.weights[i], grad);
    clear_absent(0, head.rows, masks[i], grad);
  }

  // grad W_i = (g + head_leak g_i)^T h_i
  const auto weight_grad = [&](int64_t i, const MatrixView& out) {
    if (!grad_fused && !(grads[i + 1] && head_leak != 0)) {  // no product: zero times inf is NaN
      Tensor zeros = out.view();
      torch::stable::zero_(zeros);
      return;
    }
    const MatrixView residual =
        mixed({{grad_fused, 1}, {grads[i + 1], head_leak}}, head.rows, head.classes, head.compute);
    matmul(residual.transposed(), head.features[i], out);
  };
  for (size_t w = 0; w < weights.size(); ++w) {
    if (!needs.weights[w]) continue;
    results.push_back(empty_cpu(shape_of(weights[w]), head.compute));
    const MatrixView out = MatrixView::from_rows(results.back());
    if (!head.shared) {
      weight_grad(static_cast<int64_t>(w), out);
      continue;
    }
    for (int64_t i = 0; i < head.modalities(); ++i) {
      weight_grad(i, out.columns(head.begin[i], head.features[i].cols));
    }
  }

  // grad b = sum over rows of g, and head_leak of the g_i whose logits have this bias
  for (size_t b = 0; b < weights.size(); ++b) {
    if (!needs.biases[b]) continue;
    std::vector<Share> shares{{grad_fused, 1}};
    for (int64_t i = 0; i < head.modalities(); ++i) {
      if (head.shared || i == static_cast<int64_t>(b)) shares.push_back({grads[i + 1], head_leak});
    }
    results.push_back(summed_rows(shares, head.rows, head.classes, head.compute));
  }
  return to_storage(std::move(results), head.storage);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgl_ext, CPU, m) {
  m.impl("linear_head_forward", DGL_EXT_CPU_OP(&forward));
  m.impl("linear_head_backward", DGL_EXT_CPU_OP(&backward));
}

}  // namespace dgl_ext::cpu
