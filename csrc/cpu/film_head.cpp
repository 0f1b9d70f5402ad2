// The FiLM head on the CPU: x conditions y through [gamma | beta] = x W_f^T + b_f, the hidden rows
// are h = gamma y + beta, and the logits h W_o^T + b_o. The unimodal branches share W_o and b_o:
// x alone leaves h_x = beta, y alone leaves h_y = b_gamma y + b_beta, which needs no GEMM.
//
// Forward stacks [h; h_x; h_y] and multiplies by W_o once. In backward, d is the gradient of h:
// d = g W_o, d_x = g_x W_o, d_y = g_y W_o, each computed only where something needs it.

#include "cpu/film_head.h"

#include <torch/csrc/stable/library.h>

#include "cpu/present.h"

namespace dgl_ext::cpu {
namespace {

Masks select_present_features(const Checks& checks, const OptionalTensors& present, FilmHead& head,
                              const Tensor& like) {
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
  FilmHead head = parse_film_head(checks, features, weights);
  checks.biases(biases, weights, features[0]);
  select_present_features(checks, present, head, features[0]);
  const Tensor film_bias = bias_or_zeros(biases[0], 2 * head.hidden, head.compute);
  const Tensor out_bias = bias_or_zeros(biases[1], head.classes, head.compute);

  Shape film_shape = head.leading;
  film_shape.push_back(2 * head.hidden);
  const Tensor film = empty_cpu(film_shape, head.compute);
  const MatrixView film_rows = MatrixView::from_rows(film);
  multiply(head.x, head.film_weight.transposed(), film_rows);

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

  const MatrixView partial = multiply_weight(
      stacked, head.out_weight, empty_matrix(kBranches * head.rows, head.classes, head.compute));
  Shape shape = head.leading;
  shape.push_back(head.classes);
  std::vector<Tensor> results;
  for (int64_t branch = 0; branch < kBranches; ++branch) {
    results.push_back(empty_cpu(shape, head.compute));
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

// The gradients of one backward call, each computed on request. An absent gradient of a branch's
// logits counts as zero; Python asks only for gradients to which something contributes.
class FilmBackward {
 public:
  FilmBackward(const FilmHead& head, const OptionalTensors& grad_outputs, const Tensor& film,
               const std::optional<Tensor>& film_bias, double encoder_leak, double head_leak)
      : head_(head),
        film_(MatrixView::from_rows(torch::stable::contiguous(film))),
        film_bias_(bias_or_zeros(film_bias, 2 * head.hidden, head.compute)),
        encoder_leak_(encoder_leak),
        shares_{1, head_leak, head_leak} {
    for (int64_t branch = 0; branch < kBranches; ++branch) {
      if (grad_outputs[branch]) {
        grads_[branch] = MatrixView::from_rows(to_compute(*grad_outputs[branch]));
      }
    }
  }

  // d_x W_beta, and encoder_leak of what the fused branch sends to x
  void grad_x(const MatrixView& out) {
    if (grads_[kFused] && encoder_leak_ != 0) {
      multiply(film_plane(hidden_grad(kFused), encoder_leak_, hidden_grad(kOfX), 1),
               head_.film_weight, out);
    } else if (grads_[kOfX]) {
      multiply(*hidden_grad(kOfX), head_.film_weight.row_block(head_.hidden, head_.hidden), out);
    } else {
      mix_into({}, out);  // nothing reaches x: zeros
    }
  }

  // b_gamma d_y, and encoder_leak of gamma d
  void grad_y(const MatrixView& out) {
    const std::optional<MatrixView> d =
        encoder_leak_ != 0 ? hidden_grad(kFused) : std::optional<MatrixView>();
    const std::optional<MatrixView> d_y = hidden_grad(kOfY);
    dispatch_dtype(head_.compute, [&](auto type) {
      using T = decltype(type);
      parallel_ranges(head_.rows, head_.hidden, [&](int64_t begin, int64_t end) {
        film_grad_target<T>(begin, end, head_.hidden, data_or_null<T>(d),
                            static_cast<T>(encoder_leak_), film_.data<T>(), data_or_null<T>(d_y),
                            static_cast<const T*>(film_bias_.const_data_ptr()), out.data<T>());
      });
    });
  }

  void grad_film_weight(const MatrixView& out) { multiply(film_grad().transposed(), head_.x, out); }

  // g^T h, and head_leak of g_x^T h_x and g_y^T h_y
  void grad_out_weight(const MatrixView& out) {
    std::vector<std::optional<MatrixView>> products;  // alive as long as the shares that name them
    products.reserve(kBranches);
    std::vector<Share> terms;
    for (int64_t branch = 0; branch < kBranches; ++branch) {
      if (!counts(branch)) continue;
      const bool alone = branch == kFused && shares_[kOfX] == 0;  // closed leak: straight to out
      products.push_back(alone ? out : empty_matrix(out.rows, out.cols, head_.compute));
      multiply(grads_[branch]->transposed(), hidden_rows(branch), *products.back());
      terms.push_back({products.back(), shares_[branch]});
      if (alone) return;
    }
    mix_into(terms, out);
  }

  Tensor grad_film_bias() {
    const std::optional<MatrixView> plane = film_grad();
    std::optional<MatrixView> plane_y;
    if (counts(kOfY)) plane_y = film_plane(hidden_grad(kOfY), 1, std::nullopt, 0);
    return summed_rows({{plane, 1}, {plane_y, shares_[kOfY]}}, head_.rows, 2 * head_.hidden,
                       head_.compute);
  }

  Tensor grad_out_bias() {
    return summed_rows(
        {{grads_[kFused], 1}, {grads_[kOfX], shares_[kOfX]}, {grads_[kOfY], shares_[kOfY]}},
        head_.rows, head_.classes, head_.compute);
  }

 private:
  template <typename T>
  static const T* data_or_null(const std::optional<MatrixView>& matrix) {
    return matrix ? matrix->data<T>() : nullptr;
  }

  // Whether a branch's logits train the head.
  bool counts(int64_t branch) const { return grads_[branch] && shares_[branch] != 0; }

  // grad W_o, the gradient of a branch's hidden rows; computed once, absent with the branch's.
  const std::optional<MatrixView>& hidden_grad(int64_t branch) {
    std::optional<MatrixView>& d = hidden_grads_[branch];
    if (!d && grads_[branch]) {
      d = empty_matrix(head_.rows, head_.hidden, head_.compute);
      multiply(*grads_[branch], head_.out_weight, *d);
    }
    return d;
  }

  // [s d y | s d + s_x d_x], see row_passes.h
  MatrixView film_plane(const std::optional<MatrixView>& d, double scale,
                        const std::optional<MatrixView>& d_x, double scale_x) const {
    const MatrixView out = empty_matrix(head_.rows, 2 * head_.hidden, head_.compute);
    dispatch_dtype(head_.compute, [&](auto type) {
      using T = decltype(type);
      parallel_ranges(head_.rows, 2 * head_.hidden, [&](int64_t begin, int64_t end) {
        dgl_ext::film_grad<T>(begin, end, head_.hidden, data_or_null<T>(d), static_cast<T>(scale),
                              data_or_null<T>(d_x), static_cast<T>(scale_x), head_.y.strided<T>(),
                              out.data<T>());
      });
    });
    return out;
  }

  // The gradient of [gamma | beta] that trains W_f, from the fused branch and from x alone.
  const MatrixView& film_grad() {
    if (!film_grad_) {
      film_grad_ = film_plane(hidden_grad(kFused), 1,
                              counts(kOfX) ? hidden_grad(kOfX) : std::nullopt, shares_[kOfX]);
    }
    return *film_grad_;
  }

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

  const FilmHead& head_;
  MatrixView film_;
  Tensor film_bias_;
  double encoder_leak_;
  std::array<double, kBranches> shares_;  // of each branch's gradient, to the head
  std::array<std::optional<MatrixView>, kBranches> grads_;
  std::array<std::optional<MatrixView>, kBranches> hidden_grads_;
  std::optional<MatrixView> film_grad_;
};

std::vector<Tensor> backward(OptionalTensors grad_outputs, std::vector<Tensor> features,
                             std::vector<Tensor> weights, OptionalTensors biases, Tensor film,
                             OptionalTensors present, std::vector<bool> needs_features,
                             std::vector<bool> needs_weights, std::vector<bool> needs_biases,
                             double encoder_leak, double head_leak, bool /* allow_tf32 */,
                             int64_t executor) {
  const Checks checks("film_head_backward");
  checks.executor(executor);
  FilmHead head = parse_film_head(checks, features, weights);
  checks.biases(biases, weights, features[0]);
  checks.grad_outputs(grad_outputs, kBranches, head.leading, head.classes, features[0]);
  checks.needs(needs_features, needs_weights, needs_biases, encoder_leak, head_leak, 2, 2);
  Shape film_shape = head.leading;
  film_shape.push_back(2 * head.hidden);
  checks.shape("film", film, film_shape);
  checks.saved("film", film, features[0], head.compute);

  const Masks masks = select_present_features(checks, present, head, features[0]);
  FilmBackward grads(head, grad_outputs, film, biases[0], encoder_leak, head_leak);
  std::vector<Tensor> results;
  const auto add = [&](bool needed, const Tensor& like, auto compute) {
    if (!needed) return;
    results.push_back(empty_cpu(shape_of(like), head.compute));
    compute(MatrixView::from_rows(results.back()));
  };
  add(needs_features[0], features[0], [&](const MatrixView& out) {
    grads.grad_x(out);
    clear_absent(0, head.rows, masks[0], out);
  });
  add(needs_features[1], features[1], [&](const MatrixView& out) {
    grads.grad_y(out);
    clear_absent(0, head.rows, masks[1], out);
  });
  add(needs_weights[0], weights[0], [&](const MatrixView& out) { grads.grad_film_weight(out); });
  add(needs_weights[1], weights[1], [&](const MatrixView& out) { grads.grad_out_weight(out); });
  if (needs_biases[0]) results.push_back(grads.grad_film_bias());
  if (needs_biases[1]) results.push_back(grads.grad_out_bias());
  return to_storage(std::move(results), head.storage);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgl_ext, CPU, m) {
  m.impl("film_head_forward", DGL_EXT_CPU_OP(&forward));
  m.impl("film_head_backward", DGL_EXT_CPU_OP(&backward));
}

}  // namespace dgl_ext::cpu
