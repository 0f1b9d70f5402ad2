// The FiLM head on the CPU: x conditions y through [gamma | beta] = x W_f^T + b_f, the hidden rows
// are h = gamma y + beta, and the logits h W_o^T + b_o. The unimodal branches share W_o and b_o:
// x alone leaves h_x = beta, y alone leaves h_y = b_gamma y + b_beta, which needs no GEMM.
//
// Forward stacks [h; h_x; h_y] and multiplies by W_o once. In backward, d is the gradient of h:
// d = g W_o, d_x = g_x W_o, d_y = g_y W_o, each computed only where something needs it.

#include <torch/csrc/stable/library.h>

#include "cpu/film_gradients.h"
#include "cpu/present.h"

namespace dgl_ext::cpu {
namespace {

Masks select_present_features(const Checks& checks, const OptionalTensors& present,
                              FilmArguments& head, const Tensor& like) {
  checks.masks(present, 2, head.leading, like);
  Masks masks(present, 2, head.rows);
  head.x = select_present(head.x, masks[0]);
  head.y = select_present(head.y, masks[1]);
  return masks;
}

std::vector<Tensor> forward(std::vector<Tensor> features, std::vector<Tensor> weights,
                            OptionalTensors biases, OptionalTensors present, bool /* allow_tf32 */,
                            int64_t executor) {
  const Checks checks("film_head_forward");
  checks.executor(executor);
  FilmArguments head = parse_film_head(checks, features, weights);
  checks.biases(biases, weights, features[0]);
  select_present_features(checks, present, head, features[0]);
  const Tensor film_bias = bias_or_zeros(biases[0], 2 * head.hidden, head.compute);
  const Tensor out_bias = bias_or_zeros(biases[1], head.classes, head.compute);

  const Tensor film = empty_cpu(head.with(2 * head.hidden), head.compute);
  const MatrixView film_rows = MatrixView::from_rows(film);
  matmul(head.x, head.film_weight.transposed(), film_rows);

  const MatrixView stacked = empty_matrix(kBranches * head.rows, head.hidden, head.compute);
  dispatch_dtype(head.compute, [&](auto type) {
    using T = decltype(type);
    T* film_data = film_rows.data<T>();
    const T* bias = static_cast<const T*>(film_bias.const_data_ptr());
    T* first = stacked.data<T>();
    const int64_t plane = head.rows * head.hidden;
    parallel_ranges(head.rows, 6 * head.hidden, [&](int64_t begin, int64_t end) {
      add_bias<T>(begin, end, 2 * head.hidden, film_rows.strided<T>(), bias, film_data);
      film_hidden<T>(begin, end, head.hidden, film_data, head.y.strided<T>(), bias,
                     {first, first + plane, first + 2 * plane});
    });
  });

  const MatrixView partial = linear(
      stacked, head.out_weight, empty_matrix(kBranches * head.rows, head.classes, head.compute));
  std::vector<Tensor> results;
  for (int64_t branch = 0; branch < kBranches; ++branch) {
    results.push_back(empty_cpu(head.with(head.classes), head.compute));
  }
  dispatch_dtype(head.compute, [&](auto type) {
    using T = decltype(type);
    const T* bias = static_cast<const T*>(out_bias.const_data_ptr());
    for (int64_t branch = 0; branch < kBranches; ++branch) {
      const auto in = partial.row_block(branch * head.rows, head.rows).strided<T>();
      T* out = static_cast<T*>(results[branch].data_ptr());
      parallel_ranges(head.rows, head.classes, [&](int64_t begin, int64_t end) {
        add_bias<T>(begin, end, head.classes, in, bias, out);
      });
    }
  });
  results = to_storage(std::move(results), head.storage);
  results.push_back(film);  // in the compute dtype, so that backward sees what forward saw
  return results;
}

// The gradients of W_o and b_o in one backward call. An absent gradient of a branch's logits counts
// as zero; Python asks only for gradients to which something contributes.
class OutGradients {
 public:
  using Grads = std::array<std::optional<MatrixView>, kBranches>;

  OutGradients(const FilmArguments& head, const Grads& grads, const MatrixView& film,
               const Tensor& film_bias, double head_leak)
      : head_(head),
        grads_(grads),
        film_(film),
        film_bias_(film_bias),
        shares_{1, head_leak, head_leak} {}

  // g^T h, and head_leak of g_x^T h_x and g_y^T h_y
  void weight(const MatrixView& out) const {
    std::vector<std::optional<MatrixView>> products;  // alive as long as the shares that name them
    products.reserve(kBranches);
    std::vector<Share> terms;
    for (int64_t branch = 0; branch < kBranches; ++branch) {
      if (!grads_[branch] || shares_[branch] == 0) continue;
      const bool alone = branch == kFused && shares_[kOfX] == 0;  // closed leak: straight to out
      products.push_back(alone ? out : empty_matrix(out.rows, out.cols, head_.compute));
      matmul(grads_[branch]->transposed(), hidden_rows(branch), *products.back());
      terms.push_back({products.back(), shares_[branch]});
      if (alone) return;
    }
    mix_into(terms, out);
  }

  Tensor bias() const {
    return summed_rows(
        {{grads_[kFused], 1}, {grads_[kOfX], shares_[kOfX]}, {grads_[kOfY], shares_[kOfY]}},
        head_.rows, head_.classes, head_.compute);
  }

 private:
  // A branch's hidden rows, made again from gamma and beta.
  MatrixView hidden_rows(int64_t branch) const {
    if (branch == kOfX) return film_.columns(head_.hidden, head_.hidden);
    const MatrixView out = empty_matrix(head_.rows, head_.hidden, head_.compute);
    dispatch_dtype(head_.compute, [&](auto type) {
      using T = decltype(type);
      T* data = out.data<T>();
      const FilmHidden<T> wanted{branch == kFused ? data : nullptr, nullptr,
                                 branch == kOfY ? data : nullptr};
      parallel_ranges(head_.rows, 3 * head_.hidden, [&](int64_t begin, int64_t end) {
        film_hidden<T>(begin, end, head_.hidden, film_.data<T>(), head_.y.strided<T>(),
                       static_cast<const T*>(film_bias_.const_data_ptr()), wanted);
      });
    });
    return out;
  }

  const FilmArguments& head_;
  const Grads& grads_;
  const MatrixView& film_;
  const Tensor& film_bias_;
  std::array<double, kBranches> shares_;  // of each branch's gradient, to the head
};

std::vector<Tensor> backward(OptionalTensors grad_outputs, std::vector<Tensor> features,
                             std::vector<Tensor> weights, OptionalTensors biases, Tensor film,
                             OptionalTensors present, std::vector<bool> needs_features,
                             std::vector<bool> needs_weights, std::vector<bool> needs_biases,
                             double encoder_leak, double head_leak, bool /* allow_tf32 */,
                             int64_t executor) {
  const Checks checks("film_head_backward");
  checks.executor(executor);
  FilmArguments head = parse_film_head(checks, features, weights);
  checks.biases(biases, weights, features[0]);
  const Needs needs{needs_features, needs_weights, needs_biases};
  checks.grad_outputs(grad_outputs, kBranches, head, features[0]);
  checks.needs(needs, encoder_leak, head_leak, 2, 2);
  checks.of_dtype("film", film, head.compute, head.with(2 * head.hidden), features[0]);

  const Masks masks = select_present_features(checks, present, head, features[0]);
  OutGradients::Grads grads;
  for (int64_t branch = 0; branch < kBranches; ++branch) {
    if (grad_outputs[branch]) {
      grads[branch] = MatrixView::from_rows(to_compute(*grad_outputs[branch]));
    }
  }
  const MatrixView modulation = MatrixView::from_rows(torch::stable::contiguous(film));
  const Tensor film_bias = bias_or_zeros(biases[0], 2 * head.hidden, head.compute);
  const bool trains_film = needs.weights[0] || needs.biases[0];
  const bool leaks = head_leak != 0;
  const std::array<bool, kBranches> needed{
      trains_film || (encoder_leak != 0 && Needs::any(needs.features)),
      needs.features[0] || (leaks && trains_film), needs.features[1] || (leaks && needs.biases[0])};

  std::vector<Tensor> results;
  const auto add = [&](bool wanted, const Tensor& like) -> std::optional<MatrixView> {
    if (!wanted) return std::nullopt;
    results.push_back(empty_cpu(shape_of(like), head.compute));
    return MatrixView::from_rows(results.back());
  };
  const auto grad_x = add(needs.features[0], features[0]);
  const auto grad_y = add(needs.features[1], features[1]);
  const auto grad_film_weight = add(needs.weights[0], weights[0]);
  const auto grad_out_weight = add(needs.weights[1], weights[1]);
  std::vector<double> film_bias_totals(needs.biases[0] ? 2 * head.hidden : 0, 0.0);
  dispatch_dtype(head.compute, [&](auto type) {
    using T = decltype(type);
    std::array<std::unique_ptr<T[]>, kBranches> d;  // grad W_o
    for (int64_t branch = 0; branch < kBranches; ++branch) {
      if (!needed[branch] || !grads[branch]) continue;
      d[branch] = allocate<T>(head.rows * head.hidden);
      matmul(*grads[branch], head.out_weight,
             MatrixView::from_memory(d[branch].get(), head.rows, head.hidden, head.compute));
    }
    const int64_t planes_needed = leaks ? 2 : trains_film || encoder_leak != 0;
    const auto planes = allocate<T>(planes_needed * head.rows * 2 * head.hidden);
    const FilmGradients<T> film_grads(head, head.x, head.y, modulation.data<T>(),
                                      static_cast<const T*>(film_bias.const_data_ptr()),
                                      {d[kFused].get(), d[kOfX].get(), d[kOfY].get()}, encoder_leak,
                                      head_leak, planes.get());
    if (grad_x) film_grads.grad_x(*grad_x);
    if (grad_y) film_grads.grad_y(*grad_y);
    if (trains_film) film_grads.add_parameters(grad_film_weight, false, film_bias_totals);
  });
  if (grad_x) clear_absent(0, head.rows, masks[0], *grad_x);
  if (grad_y) clear_absent(0, head.rows, masks[1], *grad_y);
  const OutGradients out_grads(head, grads, modulation, film_bias, head_leak);
  if (grad_out_weight) out_grads.weight(*grad_out_weight);
  if (needs.biases[0]) results.push_back(rounded(film_bias_totals, head.compute));
  if (needs.biases[1]) results.push_back(out_grads.bias());
  return to_storage(std::move(results), head.storage);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgl_ext, CPU, m) {
  m.impl("film_head_forward", DGL_EXT_CPU_OP(&forward));
  m.impl("film_head_backward", DGL_EXT_CPU_OP(&backward));
}

}  // namespace dgl_ext::cpu
