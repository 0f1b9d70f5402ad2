// The FiLM head on the CPU: x conditions y through [gamma | beta] = x W_f^T + b_f, the hidden rows
// are h = gamma y + beta, and the logits h W_o^T + b_o. The unimodal branches share W_o and b_o:
// x alone leaves h_x = beta, y alone leaves h_y = b_gamma y + b_beta, which needs no GEMM.
//
// The three branches are stacked along the rows, [h; h_x; h_y]. So one product takes them through
// W_o; in the step one takes their gradients back, and where the head's leak is open one makes the
// gradient of W_o. d is the gradient of h: d = g W_o, d_x = g_x W_o, d_y = g_y W_o, each taken only
// where something needs it.
//
// In backward g, g_x and g_y are the gradients of the logits as they came in. In the step they are
// residuals, which take the logits' place. There hidden rows and logits of all rows are there at a
// time where they fit the workspace; else rows run in chunks, and the head's gradients are summed
// over the chunks.

#include <torch/csrc/stable/library.h>

#include "cpu/step.h"

namespace dgl_ext::cpu {
namespace {

using FilmArguments = HeadArguments<FilmSizes>;

enum Branch : int64_t { kFused, kOfX, kOfY };
constexpr int64_t kBranches = 3;

template <typename T>
class FilmCall {
 public:
  FilmCall(const FilmArguments& head, const OptionalTensors& biases)
      : head_(head),
        film_bias_(bias_or_zeros(biases[0], 2 * head.hidden, head.compute)),
        out_bias_(bias_or_zeros(biases[1], head.classes, head.compute)) {}

  // The logits, fused first, and [gamma | beta] in the compute dtype, so that backward sees what
  // forward saw.
  std::vector<Tensor> forward() {
    const Tensor film = empty_cpu(head_.with(2 * head_.hidden), head_.compute);
    film_ = static_cast<T*>(film.data_ptr());
    rows_ = head_.rows;
    hidden_ = plane(kBranches * rows_, head_.hidden);
    logits_ = plane(kBranches * rows_, head_.classes);
    make_hidden();
    std::vector<Tensor> results;
    std::array<T*, kBranches> logits;
    for (T*& of_branch : logits) {
      results.push_back(empty_cpu(head_.with(head_.classes), head_.compute));
      of_branch = static_cast<T*>(results.back().data_ptr());
    }
    make_logits(logits);
    results = to_storage(std::move(results), head_.storage);
    results.push_back(film);
    return results;
  }

  // The gradients that are needed, from those of the logits, fused first, and from what forward
  // kept.
  std::vector<Tensor> backward(const OptionalTensors& grad_outputs, const Tensor& film,
                               const Needs& needs, const Leaks& leaks) {
    std::vector<Tensor> held;
    film_ = const_cast<T*>(flat_data<T>(film, held));  // only read
    rows_ = head_.rows;
    plan_gradients(needs, leaks,
                   {grad_outputs[kFused].has_value(), grad_outputs[kOfX].has_value(),
                    grad_outputs[kOfY].has_value()});
    for (int64_t branch = 0; branch < kBranches; ++branch) {
      if (!to_hidden_[branch] && !to_out_[branch]) continue;
      incoming_[branch] = MatrixView::from_rows(to_compute(*grad_outputs[branch]));
    }
    make_film_grads();
    hidden_grads_.reset();  // makes room for the hidden rows
    film_grads_.reset();
    if (grads_.weights[1]) {
      hidden_ = plane(kBranches * rows_, head_.hidden);
      const MatrixView y_rows = y();
      const FilmHidden<T> out = hidden_rows(to_out_);
      parallel_ranges(rows_, 3 * head_.hidden, [&](int64_t begin, int64_t end) {
        film_hidden<T>(begin, end, head_.hidden, film_, y_rows.strided<T>(), film_bias(), out);
      });
    }
    make_out_grads();
    return grads_.results(head_.masks);
  }

  // The gradients that are needed, and the losses on the way.
  std::vector<Tensor> step(BranchLosses& losses, const Needs& needs, const Leaks& leaks,
                           int64_t workspace_limit) {
    losses_ = &losses;
    // [gamma | beta] and two of its gradients' planes; hidden rows and their gradients; logits, and
    // as much again where the product is put into a matrix of its own.
    const int64_t most = 6 * head_.hidden + 2 * kBranches * (head_.hidden + head_.classes);
    const int64_t chunk =
        chunk_rows(head_.rows, most * static_cast<int64_t>(sizeof(T)), workspace_limit);
    const Plane film = plane(chunk, 2 * head_.hidden);
    film_ = film.get();
    hidden_ = plane(kBranches * chunk, head_.hidden);
    logits_ = plane(kBranches * chunk, head_.classes);
    rows_ = chunk;
    plan_gradients(needs, leaks, {true, true, true});
    for_chunks(head_.rows, chunk, [&](int64_t first_row, int64_t rows) {
      rows_ = rows;
      first_row_ = first_row;
      losses.start_chunk(first_row);
      make_hidden();
      make_logits({part(logits_, kFused, head_.classes), part(logits_, kOfX, head_.classes),
                   part(logits_, kOfY, head_.classes)});
      make_film_grads();
      make_out_grads();
    });
    return grads_.results(head_.masks);
  }

 private:
  using Plane = std::unique_ptr<T[]>;
  using Branches = std::array<bool, kBranches>;

  static Plane plane(int64_t rows, int64_t cols) { return allocate<T>(rows * cols); }
  static bool any(const Branches& of) { return of[kFused] || of[kOfX] || of[kOfY]; }

  MatrixView matrix(T* data, int64_t rows, int64_t cols) const {
    return MatrixView::from_memory(data, rows, cols, head_.compute);
  }
  // The part of one branch in a stack of all three.
  T* part(const Plane& stack, int64_t branch, int64_t cols) const {
    return stack.get() + branch * rows_ * cols;
  }
  // Neighbours in a stack.
  MatrixView parts(const Plane& stack, int64_t first, int64_t count, int64_t cols) const {
    return matrix(part(stack, first, cols), count * rows_, cols);
  }
  // Calls f(first, count) for branches that take part. In the step neighbours lie side by side: one
  // product does for them.
  template <typename F>
  void for_branches(const Branches& of, const F& f) const {
    for (int64_t first = 0; first < kBranches;) {
      int64_t last = first;
      while (last < kBranches && of[last] && (last == first || losses_ != nullptr)) ++last;
      if (last > first) f(first, last - first);
      first = std::max(last, first + 1);
    }
  }
  // The gradients of the logits of neighbours.
  MatrixView gradients(int64_t first, int64_t count) const {
    return losses_ != nullptr ? parts(logits_, first, count, head_.classes) : *incoming_[first];
  }

  MatrixView x() const { return head_.features[0].row_block(first_row_, rows_); }
  MatrixView y() const { return head_.features[1].row_block(first_row_, rows_); }
  const T* film_bias() const { return static_cast<const T*>(film_bias_.const_data_ptr()); }
  FilmHidden<T> hidden_rows(const Branches& wanted) const {
    const auto of = [&](int64_t branch) {
      return wanted[branch] ? part(hidden_, branch, head_.hidden) : nullptr;
    };
    return {of(kFused), of(kOfX), of(kOfY)};
  }
  // d, d_x or d_y; null where nothing arrives from that branch, or nothing needs it.
  T* hidden_grad(int64_t branch) const {
    return to_hidden_[branch] ? part(hidden_grads_, branch, head_.hidden) : nullptr;
  }

  // Which branches' gradients go through W_o to what is behind it, and which to W_o and b_o.
  void plan_gradients(const Needs& needs, const Leaks& leaks, const Branches& arrives) {
    leaks_ = leaks;
    const bool leaks_out = leaks.encoder != 0, leaks_in = leaks.head != 0;
    const bool trains_film = needs.weights[0] || needs.biases[0];
    const bool trains_out = needs.weights[1] || needs.biases[1];
    to_hidden_ = {
        arrives[kFused] && (trains_film || (leaks_out && Needs::any(needs.features))),
        arrives[kOfX] && (needs.features[0] || (leaks_in && trains_film)),
        arrives[kOfY] && (needs.features[1] || (leaks_in && needs.biases[0]))};  // W_f sees no y
    to_out_ = {arrives[kFused] && trains_out, arrives[kOfX] && trains_out && leaks_in,
               arrives[kOfY] && trains_out && leaks_in};
    if (any(to_hidden_)) {
      hidden_grads_ = plane(kBranches * rows_, head_.hidden);
      film_grads_ = plane(2 * rows_, 2 * head_.hidden);
    }
    grads_ = Gradients(head_, needs);
    // Where nothing arrives there is no product: zero times infinity is NaN.
    const auto finish_unless = [](bool reached, std::optional<MatrixView>& grad) {
      if (reached || !grad) return;
      set_zero(*grad);
      grad.reset();
    };
    for (int64_t i = 0; i < 2; ++i) {
      finish_unless(arrives[i + 1] || (arrives[kFused] && leaks_out), grads_.features[i]);
    }
    finish_unless(arrives[kFused] || (arrives[kOfX] && leaks_in), grads_.weights[0]);
    finish_unless(any(to_out_), grads_.weights[1]);
  }

  void make_hidden() {
    const int64_t hidden = head_.hidden;
    const MatrixView film = matrix(film_, rows_, 2 * hidden);
    matmul(x(), head_.weights[0].transposed(), film);
    const MatrixView y_rows = y();
    const FilmHidden<T> out = hidden_rows({true, true, true});
    parallel_ranges(rows_, 6 * hidden, [&](int64_t begin, int64_t end) {
      add_bias<T>(begin, end, 2 * hidden, film.strided<T>(), film_bias(), film_);
      film_hidden<T>(begin, end, hidden, film_, y_rows.strided<T>(), film_bias(), out);
    });
  }

  // The logits of all branches, and in the step their residuals in their place.
  void make_logits(const std::array<T*, kBranches>& out) {
    const int64_t classes = head_.classes;
    const MatrixView partial = linear(parts(hidden_, kFused, kBranches, head_.hidden),
                                      head_.weights[1], parts(logits_, kFused, kBranches, classes));
    const T* bias = static_cast<const T*>(out_bias_.const_data_ptr());
    parallel_ranges(rows_, 4 * kBranches * classes, [&](int64_t begin, int64_t end) {
      for (int64_t branch = 0; branch < kBranches; ++branch) {
        const auto in = partial.row_block(branch * rows_, rows_).template strided<T>();
        const bool residual = to_hidden_[branch] || to_out_[branch];
        for_cached_rows(begin, end, classes, [&](int64_t first, int64_t last) {
          add_bias<T>(first, last, classes, in, bias, out[branch]);
          if (losses_ == nullptr) return;
          losses_->template add_rows<T>(first, last, branch, residual, out[branch]);
        });
      }
    });
  }

  // Of both features, W_f and b_f.
  void make_film_grads() {
    if (!any(to_hidden_)) return;
    const int64_t hidden = head_.hidden;
    for_branches(to_hidden_, [&](int64_t first, int64_t count) {
      matmul(gradients(first, count), head_.weights[1], parts(hidden_grads_, first, count, hidden));
    });
    // What the fused branch sends to the features.
    const T* leaking = leaks_.encoder != 0 ? hidden_grad(kFused) : nullptr;
    if (grads_.features[0]) {
      const MatrixView out = grads_.features[0]->row_block(first_row_, rows_);
      if (leaking != nullptr) {
        matmul(film_grad_plane(0, leaking, leaks_.encoder, hidden_grad(kOfX), 1), head_.weights[0],
               out);
      } else {
        matmul(parts(hidden_grads_, kOfX, 1, hidden), head_.weights[0].row_block(hidden, hidden),
               out);
      }
    }
    if (grads_.features[1]) {
      T* out = grads_.features[1]->row_block(first_row_, rows_).template data<T>();
      parallel_ranges(rows_, hidden, [&](int64_t begin, int64_t end) {
        film_grad_target<T>(begin, end, hidden, leaking, static_cast<T>(leaks_.encoder), film_,
                            hidden_grad(kOfY), film_bias(), out);
      });
    }
    // W_f hears from the fused branch and, through the leak, from x alone; its bias from y too.
    if (!grads_.weights[0] && !grads_.biases[0]) return;
    const bool leaks = leaks_.head != 0;
    const MatrixView grad = film_grad_plane(0, hidden_grad(kFused), 1,
                                            leaks ? hidden_grad(kOfX) : nullptr, leaks_.head);
    if (grads_.weights[0] && hidden_grad(kFused) != nullptr) {
      matmul(grad.transposed(), x(), *grads_.weights[0], first_row_ > 0);
    } else if (grads_.weights[0]) {  // beta's half alone: zero times infinity is NaN
      set_zero(grads_.weights[0]->row_block(0, hidden));
      matmul(grad.columns(hidden, hidden).transposed(), x(),
             grads_.weights[0]->row_block(hidden, hidden));
    }
    if (!grads_.biases[0]) return;
    std::vector<Term<T>> terms{{grad.strided<T>(), T(1)}};
    if (leaks && hidden_grad(kOfY) != nullptr) {
      terms.push_back({film_grad_plane(1, hidden_grad(kOfY), 1, nullptr, 0).template strided<T>(),
                       static_cast<T>(leaks_.head)});
    }
    add_sums(terms, rows_, *grads_.biases[0]);
  }

  // [s d y | s d + s_x d_x], see row_passes.h
  MatrixView film_grad_plane(int64_t k, const T* d, double scale, const T* d_x, double scale_x) {
    T* out = film_grads_.get() + k * rows_ * 2 * head_.hidden;
    const MatrixView y_rows = y();
    parallel_ranges(rows_, 2 * head_.hidden, [&](int64_t begin, int64_t end) {
      film_grad<T>(begin, end, head_.hidden, d, static_cast<T>(scale), d_x, static_cast<T>(scale_x),
                   y_rows.strided<T>(), out);
    });
    return matrix(out, rows_, 2 * head_.hidden);
  }

  // Of W_o and b_o: from the fused branch and, through the leak, the others. Nothing reads the
  // hidden rows after this, so the leak scales them in place.
  void make_out_grads() {
    bool add = first_row_ > 0;
    std::vector<Term<T>> terms;
    for_branches(to_out_, [&](int64_t first, int64_t count) {
      for (int64_t branch = first; branch < first + count; ++branch) {
        const MatrixView grad = gradients(first, count).row_block((branch - first) * rows_, rows_);
        terms.push_back({grad.strided<T>(), static_cast<T>(branch == kFused ? 1 : leaks_.head)});
      }
      if (!grads_.weights[1]) return;
      const int64_t alone = std::max<int64_t>(first, kOfX);
      scale(part(hidden_, alone, head_.hidden), (first + count - alone) * rows_, leaks_.head);
      matmul(gradients(first, count).transposed(), parts(hidden_, first, count, head_.hidden),
             *grads_.weights[1], add);
      add = true;
    });
    if (grads_.biases[1]) add_sums(terms, rows_, *grads_.biases[1]);
  }

  void scale(T* hidden, int64_t rows, double by) const {
    const T factor = static_cast<T>(by);
    parallel_ranges(rows, head_.hidden, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin * head_.hidden; k < end * head_.hidden; ++k) hidden[k] *= factor;
    });
  }

  const FilmArguments& head_;
  Tensor film_bias_;
  Tensor out_bias_;
  BranchLosses* losses_ = nullptr;  // of the step
  Leaks leaks_;
  Gradients grads_;
  Branches to_hidden_{};
  Branches to_out_{};
  int64_t rows_ = 0;  // of the chunk
  int64_t first_row_ = 0;
  T* film_ = nullptr;  // [gamma | beta]
  Plane hidden_;
  Plane logits_;                                               // and in the step their gradients
  std::array<std::optional<MatrixView>, kBranches> incoming_;  // in backward
  Plane hidden_grads_;
  Plane film_grads_;
};

struct FilmOps {
  static constexpr const char* kForward = "film_head_forward";
  static constexpr const char* kBackward = "film_head_backward";
  static constexpr const char* kStep = "film_head_step";
  static constexpr auto kSizes = &Checks::film;
  template <typename T>
  using Call = FilmCall<T>;
};

std::vector<Tensor> backward(OptionalTensors grad_outputs, std::vector<Tensor> features,
                             std::vector<Tensor> weights, OptionalTensors biases, Tensor film,
                             OptionalTensors present, std::vector<bool> needs_features,
                             std::vector<bool> needs_weights, std::vector<bool> needs_biases,
                             double encoder_leak, double head_leak, bool /* allow_tf32 */,
                             int64_t executor) {
  const Checks checks(FilmOps::kBackward);
  checks.executor(executor);
  const FilmSizes sizes = checks.film(features, weights);
  checks.biases(biases, weights, features[0]);
  const Needs needs{needs_features, needs_weights, needs_biases};
  checks.grad_outputs(grad_outputs, kBranches, sizes, features[0]);
  checks.needs(needs, encoder_leak, head_leak, 2, 2);
  checks.of_dtype("film", film, compute_dtype(features[0].scalar_type()),
                  sizes.with(2 * sizes.hidden), features[0]);
  checks.masks(present, 2, sizes.leading, features[0]);
  const FilmArguments head = as_matrices(sizes, features, weights, present);
  auto grads = dispatch_dtype(head.compute, [&](auto type) {
    return FilmCall<decltype(type)>(head, biases)
        .backward(grad_outputs, film, needs, {encoder_leak, head_leak});
  });
  return to_storage(std::move(grads), head.storage);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgl_ext, CPU, m) {
  m.impl(FilmOps::kForward, DGL_EXT_CPU_OP(&forward<FilmOps>));
  m.impl(FilmOps::kBackward, DGL_EXT_CPU_OP(&backward));
  m.impl(FilmOps::kStep, DGL_EXT_CPU_OP(&step<FilmOps>));
}

}  // namespace dgl_ext::cpu
