// The linear head (concat and sum) on the CPU: logits, what their gradients make of the features
// and parameters, and both with the losses in between as one training step. 2 units of work forward
// and 4 backward for two modalities, as products on views of the weight, without a cat and without
// zero blocks.
//
// concat and sum are one head here. They differ in where a modality's weight lies (columns of one
// weight, or a weight of its own) and in whose bias a modality's logits get (the shared one, or its
// own); the fused logits are the sum of the same products either way.
//
// All gradients come from planes of rows x C:
//
//     fused      g        trains the head
//     branch i   g_i      trains encoder i
//     mixed      g_i + encoder_leak g, and g + head_leak g_i, where a leak is open
//
// In backward g and g_i are the gradients of the logits as they came in. In the step they are
// residuals, which take the logits' place. Its planes of all rows are there at a time where they
// fit the workspace; else rows run in chunks, and the head's gradients are summed over the chunks.

#include <torch/csrc/stable/library.h>

#include "cpu/step.h"

namespace dgl_ext::cpu {
namespace {

using LinearArguments = HeadArguments<LinearSizes>;

template <typename T>
class LinearCall {
 public:
  LinearCall(const LinearArguments& head, const OptionalTensors& biases)
      : head_(head),
        fused_bias_(head.classes, T(0)),
        planes_(head.modalities() + 1, nullptr),
        feature_planes_(head.modalities(), nullptr),
        weight_planes_(head.modalities(), nullptr),
        grad_weights_(head.modalities()) {
    for (int64_t i = 0; i < head.modalities(); ++i) {
      weights_.push_back(part(head.weights[owner(i)], i));
      width_ += head.features[i].cols;
    }
    dots_ = prefers_dots();
    for (const auto& bias : biases) {
      bias_rows_.push_back(bias_or_zeros(bias, head.classes, head.compute));
      const T* data = bias_data(bias_rows_.size() - 1);
      for (int64_t c = 0; c < head.classes; ++c) fused_bias_[c] += data[c];
    }
  }

  // The logits, fused first.
  std::vector<Tensor> forward() {
    std::vector<Tensor> logits;
    for (T*& plane : planes_) {
      logits.push_back(empty_cpu(head_.with(head_.classes), head_.compute));
      plane = static_cast<T*>(logits.back().data_ptr());
    }
    rows_ = chunk_ = head_.rows;
    place_products();
    make_products(0);
    parallel_ranges(rows_, head_.classes * head_.modalities(),
                    [&](int64_t begin, int64_t end) { combine(begin, end); });
    return to_storage(std::move(logits), head_.storage);
  }

  // The gradients that are needed, from those of the logits, fused first. Those are read where they
  // are, and what is mixed of them is there for one product at a time.
  std::vector<Tensor> backward(const OptionalTensors& grad_outputs, const Needs& needs,
                               const Leaks& leaks) {
    std::vector<std::optional<MatrixView>> incoming(planes_.size());
    for (size_t k = 0; k < incoming.size(); ++k) {
      if (grad_outputs[k]) incoming[k] = MatrixView::from_rows(to_compute(*grad_outputs[k]));
    }
    // The sum of what arrives: a view where that is one of them as it is.
    const auto mixed = [&](int64_t whole, int64_t leaking, double leak) {
      const std::optional<MatrixView> leaked = leak != 0 ? incoming[leaking] : std::nullopt;
      if (!leaked) return incoming[whole];
      if (!incoming[whole] && leak == 1) return leaked;
      std::vector<Term<T>> terms{{leaked->template strided<T>(), static_cast<T>(leak)}};
      if (incoming[whole]) terms.push_back({incoming[whole]->template strided<T>(), T(1)});
      const MatrixView out = empty_matrix(head_.rows, head_.classes, head_.compute);
      parallel_ranges(out.rows, out.cols, [&](int64_t begin, int64_t end) {
        mix<T>(begin, end, out.cols, terms.data(), terms.size(), out.template data<T>());
      });
      return std::optional(out);
    };
    grads_ = Gradients(head_, needs);
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      if (grads_.features[i]) {
        const auto residual = mixed(i + 1, 0, leaks.encoder);
        set_product(residual, weights_[i], *grads_.features[i]);
      }
      if (grads_.weights[owner(i)]) {
        auto residual = mixed(0, i + 1, leaks.head);
        if (residual) residual = residual->transposed();
        set_product(residual, head_.features[i], part(*grads_.weights[owner(i)], i));
      }
    }
    for (size_t b = 0; b < grads_.biases.size(); ++b) {
      if (!grads_.biases[b]) continue;
      std::vector<Term<T>> terms;
      for_bias_terms(b, leaks.head, [&](int64_t branch, double share) {
        if (!incoming[branch]) return;
        terms.push_back({incoming[branch]->template strided<T>(), static_cast<T>(share)});
      });
      add_sums(terms, head_.rows, *grads_.biases[b]);
    }
    return grads_.results(head_.masks);
  }

  // The gradients that are needed, and the losses on the way.
  std::vector<Tensor> step(BranchLosses& losses, const Needs& needs, const Leaks& leaks,
                           int64_t workspace_limit) {
    losses_ = &losses;
    const bool leaks_out = leaks.encoder != 0, leaks_in = leaks.head != 0;
    residual_ = {needs.head() || (leaks_out && Needs::any(needs.features))};
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      residual_.push_back(needs.features[i] || (leaks_in && needs.head()));
    }
    const int64_t planes = losses.branches() + most_mixes(needs, leaks);
    chunk_ = choose_chunk(planes, workspace_limit);
    workspace_ = allocate<T>(planes * chunk_ * head_.classes);
    for (T*& plane : planes_) plane = new_plane();
    place_products();
    plan_gradients(needs, leaks);
    for_chunks(head_.rows, chunk_, [&](int64_t first_row, int64_t rows) {
      rows_ = rows;
      losses.start_chunk(first_row);
      run(first_row);
    });
    return grads_.results(head_.masks);
  }

 private:
  // One weight and bias for all modalities, or one each.
  size_t owner(int64_t i) const { return head_.shared ? 0 : i; }
  // A modality's part of a weight, or of its gradient.
  MatrixView part(const MatrixView& weight, int64_t i) const {
    return head_.shared ? weight.columns(head_.begin[i], head_.features[i].cols) : weight;
  }
  const T* bias_data(size_t b) const {
    return static_cast<const T*>(bias_rows_[b].const_data_ptr());
  }
  MatrixView matrix(T* data) const {
    return MatrixView::from_memory(data, rows_, head_.classes, head_.compute);
  }
  Strided<T> row_major(const T* data) const { return {data, head_.classes, 1}; }

  // linear may put the logits of few classes, or of few rows, into a matrix of its own.
  int64_t choose_chunk(int64_t planes, int64_t workspace_limit) const {
    const int64_t bytes = head_.classes * static_cast<int64_t>(sizeof(T));
    const int64_t rows =
        chunk_rows(head_.rows, (planes + head_.modalities()) * bytes, workspace_limit);
    if (may_flip(rows, head_.classes)) return rows;
    return chunk_rows(head_.rows, planes * bytes, workspace_limit);
  }

  int64_t most_mixes(const Needs& needs, const Leaks& leaks) const {
    int64_t count = 0;
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      count += leaks.encoder != 0 && needs.features[i];
      count += leaks.head != 0 && needs.weights[owner(i)];
    }
    return count;
  }
  T* new_plane() { return workspace_.get() + planes_made_++ * chunk_ * head_.classes; }

  // The plane of whole + leak * leaking: a new one where the leak is open.
  T* mixed(T* whole, T* leaking, double leak) {
    if (leak == 0) return whole;
    mixes_.push_back(
        {{{row_major(whole), T(1)}, {row_major(leaking), static_cast<T>(leak)}}, new_plane()});
    return mixes_.back().out;
  }

  // Calls f(branch, share) for what the gradient of a bias is summed from. The shared bias is in
  // every modality's logits, a bias of one modality in its own.
  template <typename F>
  void for_bias_terms(size_t b, double leak, const F& f) const {
    f(0, 1.0);
    for (int64_t i = 0; leak != 0 && i < head_.modalities(); ++i) {
      if (owner(i) == b) f(i + 1, leak);
    }
  }

  // Where nothing arrives there is no product: zero times infinity is NaN.
  static void set_product(const std::optional<MatrixView>& a, const MatrixView& b,
                          const MatrixView& out) {
    if (a) {
      matmul(*a, b, out);
    } else {
      set_zero(out);
    }
  }

  // From which plane each gradient comes.
  void plan_gradients(const Needs& needs, const Leaks& leaks) {
    grads_ = Gradients(head_, needs);
    needs_ = needs;
    leaks_ = leaks;
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      if (grads_.features[i]) {
        feature_planes_[i] = mixed(planes_[i + 1], planes_[0], leaks.encoder);
      }
      if (const auto& whole = grads_.weights[owner(i)]) {
        grad_weights_[i] = part(*whole, i);
        weight_planes_[i] = mixed(planes_[0], planes_[i + 1], leaks.head);
      }
    }
  }

  // Whether the logits are taken by `matmul_dots`, which copy nothing, rather than by
  // `matmul_packed`.
  bool prefers_dots() const {
    constexpr int64_t kFewClasses = 128;  // with more, packing the features pays ...
    constexpr int64_t kPanel = 32;        // ... if a thread has so many rows
    const int64_t threads = torch::stable::get_num_threads();
    return head_.classes <= kFewClasses || head_.rows < kPanel * threads;
  }

  // Whether our own products, fused by rows, replace the library's. The bounds on the multiply-adds
  // are the largest that were timed, on two cores; up to there ours were faster.
  bool runs_by_rows() const {
    const int64_t most = int64_t{1} << (dots_ || isa() == Isa::kPortable ? 27 : 32);
    if (chunk_ < head_.rows || !may_run_own()) return false;
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      if (!head_.features[i].has_contiguous_rows() || !weights_[i].has_contiguous_rows() ||
          (dots_ && head_.features[i].cols > kLongestDots)) {
        return false;
      }
    }
    return head_.rows * head_.classes * width_ <= most;
  }

  // A modality's product goes where its logits will be.
  void place_products() {
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      branches_.push_back({row_major(planes_[i + 1]), bias_data(owner(i)), planes_[i + 1]});
    }
  }

  // h_i W_i^T of a range of rows
  void multiply_rows(int64_t begin, int64_t end) {
    const int64_t classes = head_.classes;
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      const MatrixView& feature = head_.features[i];
      const Strided<T> weight = weights_[i].template strided<T>();
      if (dots_) {
        matmul_dots<T>(begin, end, classes, feature.cols, feature.template strided<T>(), weight,
                       planes_[i + 1]);
      } else {  // the logits' transpose, so that the features are packed: the weight is larger
        matmul_packed<T>(0, classes, begin, end, feature.cols, weight,
                         feature.transposed().template strided<T>(), {planes_[i + 1], 1, classes});
      }
    }
  }

  void run(int64_t first_row) {
    if (runs_by_rows()) {
      run_by_rows();
    } else {
      run_by_products(first_row);
    }
  }

  // Two passes over the threads: rows to their losses and features' gradients, while they are in
  // cache; then columns of the weights' gradients.
  void run_by_rows() {
    const int64_t classes = head_.classes;
    parallel_ranges(rows_, classes * (width_ / 4 + 16), [&](int64_t begin, int64_t end) {
      multiply_rows(begin, end);
      finish_planes(begin, end);
      for (int64_t i = 0; i < head_.modalities(); ++i) {
        if (!grads_.features[i]) continue;
        const MatrixView& grad = *grads_.features[i];
        matmul_packed<T>(begin, end, 0, grad.cols, classes, row_major(feature_planes_[i]),
                         weights_[i].template strided<T>(),
                         {grad.template data<T>(), grad.row_stride()});
      }
    });
    if (!needs_.head()) return;

    constexpr int64_t kUnit = 64;  // columns: whole cache lines and vectors
    const int64_t units = std::max<int64_t>(1, (width_ + kUnit - 1) / kUnit);
    parallel_ranges(units, kUnit * rows_ * classes / 8, [&](int64_t begin, int64_t end) {
      int64_t first = begin * kUnit;  // columns of what is left
      int64_t last = std::min(width_, end * kUnit);
      for (int64_t i = 0; i < head_.modalities(); ++i) {
        const int64_t cols = head_.features[i].cols;
        if (grad_weights_[i] && first < cols && last > 0) {
          matmul_packed<T>(0, classes, std::max<int64_t>(0, first), std::min(cols, last), rows_,
                           {weight_planes_[i], 1, classes}, head_.features[i].template strided<T>(),
                           {grad_weights_[i]->template data<T>(), grad_weights_[i]->row_stride()});
        }
        first -= cols;
        last -= cols;
      }
      add_biases(classes * begin / units, classes * end / units);
    });
  }

  void run_by_products(int64_t first_row) {
    make_products(first_row);
    parallel_ranges(rows_, 4 * head_.classes * static_cast<int64_t>(planes_.size()),
                    [&](int64_t begin, int64_t end) { finish_planes(begin, end); });
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      if (!grads_.features[i]) continue;
      matmul(matrix(feature_planes_[i]), weights_[i],
             grads_.features[i]->row_block(first_row, rows_));
    }
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      if (!grad_weights_[i]) continue;
      matmul(matrix(weight_planes_[i]).transposed(), head_.features[i].row_block(first_row, rows_),
             *grad_weights_[i], /*add=*/first_row > 0);
    }
    if (!Needs::any(needs_.biases)) return;
    parallel_ranges(head_.classes, rows_,
                    [&](int64_t begin, int64_t end) { add_biases(begin, end); });
  }

  // h_i W_i^T
  void make_products(int64_t first_row) {
    partials_.clear();
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      partials_.push_back(linear(head_.features[i].row_block(first_row, rows_), weights_[i],
                                 matrix(planes_[i + 1])));
      branches_[i].partial = partials_[i].template strided<T>();
    }
  }

  // From products to logits.
  void combine(int64_t begin, int64_t end) {
    combine_logits<T>(begin, end, head_.classes, branches_.data(), head_.modalities(),
                      fused_bias_.data(), planes_[0]);
  }

  // From products to residuals, and from them to what is mixed.
  void finish_planes(int64_t begin, int64_t end) {
    for_cached_rows(begin, end, head_.classes, [&](int64_t first, int64_t last) {
      combine(first, last);
      for (size_t k = 0; k < planes_.size(); ++k) {
        losses_->template add_rows<T>(first, last, k, residual_[k], planes_[k]);
      }
      for (const Mix& each : mixes_) {
        mix<T>(first, last, head_.classes, each.terms.data(), each.terms.size(), each.out);
      }
    });
  }

  // A range of classes of the biases' gradients.
  void add_biases(int64_t begin, int64_t end) {
    for (size_t b = 0; b < grads_.biases.size(); ++b) {
      if (!grads_.biases[b]) continue;
      std::vector<Term<T>> terms;
      for_bias_terms(b, leaks_.head, [&](int64_t branch, double share) {
        terms.push_back({row_major(planes_[branch]), static_cast<T>(share)});
      });
      add_column_sums<T>(begin, end, rows_, terms.data(), terms.size(), grads_.biases[b]->data());
    }
  }

  struct Mix {
    std::vector<Term<T>> terms;
    T* out;
  };

  const LinearArguments& head_;
  std::vector<MatrixView> weights_;  // per modality: (C, D_i)
  std::vector<Tensor> bias_rows_;
  std::vector<T> fused_bias_;
  BranchLosses* losses_ = nullptr;  // of the step
  std::vector<bool> residual_;      // whether a branch's plane is to become its residual
  int64_t width_ = 0;               // of all features
  bool dots_;
  int64_t chunk_ = 0;
  int64_t rows_ = 0;  // of the chunk
  std::unique_ptr<T[]> workspace_;
  int64_t planes_made_ = 0;
  std::vector<T*> planes_;  // of the branches, fused first
  std::vector<Mix> mixes_;
  std::vector<T*> feature_planes_;  // what a gradient of each modality is made from
  std::vector<T*> weight_planes_;
  std::vector<MatrixView> partials_;
  std::vector<LogitsBranch<T>> branches_;
  Needs needs_;
  Leaks leaks_;
  Gradients grads_;
  std::vector<std::optional<MatrixView>> grad_weights_;  // per modality
};

struct LinearOps {
  static constexpr const char* kForward = "linear_head_forward";
  static constexpr const char* kBackward = "linear_head_backward";
  static constexpr const char* kStep = "linear_head_step";
  static constexpr auto kSizes = &Checks::linear;
  template <typename T>
  using Call = LinearCall<T>;
};

std::vector<Tensor> backward(OptionalTensors grad_outputs, std::vector<Tensor> features,
                             std::vector<Tensor> weights, OptionalTensors present,
                             std::vector<bool> needs_features, std::vector<bool> needs_weights,
                             std::vector<bool> needs_biases, double encoder_leak, double head_leak,
                             bool /* allow_tf32 */, int64_t executor) {
  const Checks checks(LinearOps::kBackward);
  checks.executor(executor);
  const LinearSizes sizes = checks.linear(features, weights);
  const Needs needs{needs_features, needs_weights, needs_biases};
  checks.grad_outputs(grad_outputs, features.size() + 1, sizes, features[0]);
  checks.needs(needs, encoder_leak, head_leak, features.size(), weights.size());
  checks.masks(present, features.size(), sizes.leading, features[0]);
  const LinearArguments head = as_matrices(sizes, features, weights, present);
  auto grads = dispatch_dtype(head.compute, [&](auto type) {
    return LinearCall<decltype(type)>(head, {}).backward(grad_outputs, needs,
                                                         {encoder_leak, head_leak});
  });
  return to_storage(std::move(grads), head.storage);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgl_ext, CPU, m) {
  m.impl(LinearOps::kForward, DGL_EXT_CPU_OP(&forward<LinearOps>));
  m.impl(LinearOps::kBackward, DGL_EXT_CPU_OP(&backward));
  m.impl(LinearOps::kStep, DGL_EXT_CPU_OP(&step<LinearOps>));
}

}  // namespace dgl_ext::cpu
