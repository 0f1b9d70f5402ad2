// The gradients of the FiLM head from those of the hidden rows: d of h = gamma y + beta, d_x of
// h_x = beta, and d_y of h_y = b_gamma y + b_beta. Logits mode and the training step share them.

#pragma once

#include <array>
#include <utility>
#include <vector>

#include "cpu/film_head.h"

namespace dgl_ext::cpu {

template <typename T>
class FilmGradients {
 public:
  // d, d_x and d_y, row-major; null where nothing arrives from that branch. `planes` has room for
  // two gradients of [gamma | beta].
  FilmGradients(const FilmArguments& head, MatrixView x, MatrixView y, const T* film,
                const T* film_bias, const std::array<T*, kBranches>& d, double encoder_leak,
                double head_leak, T* planes)
      : head_(head),
        x_(std::move(x)),
        y_(std::move(y)),
        film_(film),
        film_bias_(film_bias),
        d_(d),
        encoder_leak_(encoder_leak),
        head_leak_(head_leak),
        planes_(planes) {}

  // d_x W_beta, and encoder_leak of what the fused branch sends to x
  void grad_x(const MatrixView& out) const {
    if (d_[kFused] != nullptr && encoder_leak_ != 0) {
      matmul(plane(0, d_[kFused], encoder_leak_, d_[kOfX], 1), head_.film_weight, out);
    } else if (d_[kOfX] != nullptr) {
      matmul(MatrixView::from_memory(d_[kOfX], x_.rows, head_.hidden, head_.compute),
             head_.film_weight.row_block(head_.hidden, head_.hidden), out);
    } else {
      mix_into({}, out);  // nothing reaches x: zeros
    }
  }

  // b_gamma d_y, and encoder_leak of gamma d
  void grad_y(const MatrixView& out) const {
    const T* d = encoder_leak_ != 0 ? d_[kFused] : nullptr;
    parallel_ranges(y_.rows, head_.hidden, [&](int64_t begin, int64_t end) {
      film_grad_target<T>(begin, end, head_.hidden, d, static_cast<T>(encoder_leak_), film_,
                          d_[kOfY], film_bias_, out.data<T>());
    });
  }

  // Of W_f and b_f, added to `weight` if `add` says so and to `bias` always: from the fused branch
  // and, through the leak, x alone; the bias also y alone.
  void add_parameters(const std::optional<MatrixView>& weight, bool add,
                      std::vector<double>& bias) const {
    const bool leaks = head_leak_ != 0;
    const MatrixView grad = plane(0, d_[kFused], 1, leaks ? d_[kOfX] : nullptr, head_leak_);
    if (weight) matmul(grad.transposed(), x_, *weight, add);
    if (bias.empty()) return;
    std::vector<Term<T>> terms{{grad.strided<T>(), T(1)}};
    if (leaks && d_[kOfY] != nullptr) {
      terms.push_back(
          {plane(1, d_[kOfY], 1, nullptr, 0).template strided<T>(), static_cast<T>(head_leak_)});
    }
    add_sums(terms, x_.rows, bias);
  }

 private:
  // [s d y | s d + s_x d_x], see row_passes.h
  MatrixView plane(int64_t k, const T* d, double scale, const T* d_x, double scale_x) const {
    T* out = planes_ + k * y_.rows * 2 * head_.hidden;
    parallel_ranges(y_.rows, 2 * head_.hidden, [&](int64_t begin, int64_t end) {
      film_grad<T>(begin, end, head_.hidden, d, static_cast<T>(scale), d_x, static_cast<T>(scale_x),
                   y_.strided<T>(), out);
    });
    return MatrixView::from_memory(out, y_.rows, 2 * head_.hidden, head_.compute);
  }

  const FilmArguments& head_;
  const MatrixView x_;
  const MatrixView y_;
  const T* film_;
  const T* film_bias_;
  const std::array<T*, kBranches> d_;
  const double encoder_leak_;
  const double head_leak_;
  T* planes_;
};

}  // namespace dgl_ext::cpu
