// The training step of the linear head (concat and sum) on the CPU: logits, losses and every
// gradient in one op. The residuals take the logits' place in planes of rows x C:
//
//     fused      g        the fused residual, which trains the head
//     branch i   g_i      alpha_i times the residual of modality i, which trains encoder i
//     mixed      g_i + encoder_leak g, and g + head_leak g_i, where a leak is open
//
// The planes of all rows are there at a time where they fit the workspace; else rows run in chunks,
// and the head's gradients are summed over the chunks.

#include <torch/csrc/stable/library.h>

#include "cpu/linear_head.h"
#include "cpu/step.h"

namespace dgl_ext::cpu {
namespace {

template <typename T>
class LinearStep {
 public:
  LinearStep(const LinearArguments& head, const OptionalTensors& biases, const Needs& needs,
             BranchLosses& losses, double encoder_leak, double head_leak, int64_t workspace_limit)
      : head_(head),
        needs_(needs),
        losses_(losses),
        encoder_leak_(encoder_leak),
        head_leak_(head_leak),
        fused_bias_(head.classes, T(0)) {
    for (const auto& bias : biases) {
      bias_rows_.push_back(bias_or_zeros(bias, head.classes, head.compute));
      const T* data = bias_data(bias_rows_.size() - 1);
      for (int64_t c = 0; c < head.classes; ++c) fused_bias_[c] += data[c];
    }
    for (int64_t i = 0; i < head.modalities(); ++i) {
      features_.push_back(select_present(head.features[i], losses.present(i)));
    }
    fused_residual_ = needs.head() || (encoder_leak != 0 && Needs::any(needs.features));
    mixes_features_ = encoder_leak != 0 && Needs::any(needs.features);
    mixes_weights_ = head_leak != 0 && Needs::any(needs.weights);
    const int64_t planes =
        losses.branches() + head.modalities() * (mixes_features_ + mixes_weights_);
    chunk_ = choose_chunk(planes, workspace_limit);
    dots_ = prefers_dots();
    by_rows_ = runs_by_rows();
    workspace_ = allocate<T>(planes * chunk_ * head.classes);
    for (int64_t b = 0; b < static_cast<int64_t>(biases.size()); ++b) {
      bias_totals_.emplace_back(needs.biases[b] ? head.classes : 0, 0.0);
    }
  }

  // `grads` in the compute dtype, in the order of the results.
  std::vector<Tensor> run(const std::vector<Tensor>& features, const std::vector<Tensor>& weights) {
    std::vector<Tensor> grads;
    const auto add = [&](const Tensor& like) {
      grads.push_back(empty_cpu(shape_of(like), head_.compute));
      return MatrixView::from_rows(grads.back());
    };
    grad_features_.resize(head_.modalities());
    grad_weights_.resize(head_.modalities());
    for (size_t i = 0; i < features.size(); ++i) {
      if (needs_.features[i]) grad_features_[i] = add(features[i]);
    }
    for (size_t w = 0; w < weights.size(); ++w) {
      if (!needs_.weights[w]) continue;
      const MatrixView grad = add(weights[w]);
      for (int64_t i = 0; head_.shared && i < head_.modalities(); ++i) {
        grad_weights_[i] = grad.columns(head_.begin[i], head_.features[i].cols);
      }
      if (!head_.shared) grad_weights_[w] = grad;
    }
    for_chunks(head_.rows, chunk_, [&](int64_t begin, int64_t rows) { run_chunk(begin, rows); });
    for (size_t b = 0; b < bias_totals_.size(); ++b) {
      if (needs_.biases[b]) grads.push_back(rounded(bias_totals_[b], head_.compute));
    }
    return grads;
  }

 private:
  const T* bias_data(size_t b) const {
    return static_cast<const T*>(bias_rows_[b].const_data_ptr());
  }

  // linear may put the logits of few classes, or of few rows, into a matrix of its own.
  int64_t choose_chunk(int64_t planes, int64_t workspace_limit) const {
    const int64_t bytes = head_.classes * static_cast<int64_t>(sizeof(T));
    const int64_t rows =
        chunk_rows(head_.rows, (planes + head_.modalities()) * bytes, workspace_limit);
    if (may_flip(rows, head_.classes)) return rows;
    return chunk_rows(head_.rows, planes * bytes, workspace_limit);
  }

  // Planes of the chunk's rows: the branches, fused first; then the mixed ones.
  T* plane(int64_t k) const { return workspace_.get() + k * rows_ * head_.classes; }
  T* feature_plane(int64_t i) const {
    return plane(mixes_features_ ? losses_.branches() + i : i + 1);
  }
  T* weight_plane(int64_t i) const {
    if (!mixes_weights_) return plane(0);
    return plane(losses_.branches() + (mixes_features_ ? head_.modalities() : 0) + i);
  }
  MatrixView matrix(T* data) const {
    return MatrixView::from_memory(data, rows_, head_.classes, head_.compute);
  }

  void run_chunk(int64_t first_row, int64_t rows) {
    rows_ = rows;
    losses_.start_chunk(first_row);
    if (by_rows_) {
      run_by_rows();
    } else {
      run_by_products(first_row, rows);
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
    int64_t width = 0;
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      const int64_t each = features_[i].cols;
      if (!features_[i].has_contiguous_rows() || !head_.weights[i].has_contiguous_rows() ||
          (dots_ && each > kLongestDots)) {
        return false;
      }
      width += each;
    }
    return head_.rows * head_.classes * width <= most;
  }

  // Two passes over the threads: rows to their losses and features' gradients, while they are in
  // cache; then columns of the weights' gradients.
  void run_by_rows() {
    const int64_t classes = head_.classes;
    std::vector<LogitsBranch<T>> branches;
    int64_t width = 0;
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      const Strided<T> logits = row_major(plane(i + 1));
      branches.push_back({logits, bias_data(head_.shared ? 0 : i), plane(i + 1)});
      width += features_[i].cols;
    }
    parallel_ranges(rows_, classes * (width / 4 + 16), [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < head_.modalities(); ++i) {
        const MatrixView& feature = features_[i];
        const Strided<T> weight = head_.weights[i].template strided<T>();
        if (dots_) {
          matmul_dots<T>(begin, end, classes, feature.cols, feature.template strided<T>(), weight,
                         plane(i + 1));
        } else {  // the logits' transpose, so that the features are packed: the weight is larger
          matmul_packed<T>(0, classes, begin, end, feature.cols, weight,
                           feature.transposed().template strided<T>(), {plane(i + 1), 1, classes});
        }
      }
      residual_rows(begin, end, branches);
      for (int64_t i = 0; i < head_.modalities(); ++i) {
        if (!grad_features_[i]) continue;
        const MatrixView& grad = *grad_features_[i];
        matmul_packed<T>(begin, end, 0, grad.cols, classes, row_major(feature_plane(i)),
                         head_.weights[i].template strided<T>(),
                         {grad.data<T>(), grad.row_stride()});
        clear_absent(begin, end, losses_.present(i), grad);
      }
    });
    if (!needs_.head()) return;

    constexpr int64_t kUnit = 64;  // columns: whole cache lines and vectors
    const int64_t units = std::max<int64_t>(1, (width + kUnit - 1) / kUnit);
    parallel_ranges(units, kUnit * rows_ * classes / 8, [&](int64_t begin, int64_t end) {
      int64_t first = begin * kUnit;  // columns of what is left
      int64_t last = std::min(width, end * kUnit);
      for (int64_t i = 0; i < head_.modalities(); ++i) {
        const int64_t cols = features_[i].cols;
        if (grad_weights_[i] && first < cols && last > 0) {
          matmul_packed<T>(0, classes, std::max<int64_t>(0, first), std::min(cols, last), rows_,
                           {weight_plane(i), 1, classes}, features_[i].template strided<T>(),
                           {grad_weights_[i]->template data<T>(), grad_weights_[i]->row_stride()});
        }
        first -= cols;
        last -= cols;
      }
      add_biases(classes * begin / units, classes * end / units);
    });
  }

  // A range of classes of the biases' gradients.
  void add_biases(int64_t begin, int64_t end) {
    for (size_t b = 0; b < bias_totals_.size(); ++b) {
      if (!needs_.biases[b]) continue;
      const std::vector<Term<T>> terms = bias_terms(b);
      add_column_sums<T>(begin, end, rows_, terms.data(), terms.size(), bias_totals_[b].data());
    }
  }

  void run_by_products(int64_t first_row, int64_t rows) {
    std::vector<LogitsBranch<T>> branches;
    std::vector<MatrixView> partials;
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      partials.push_back(
          linear(features_[i].row_block(first_row, rows), head_.weights[i], matrix(plane(i + 1))));
      branches.push_back({partials[i].strided<T>(), bias_data(head_.shared ? 0 : i), plane(i + 1)});
    }
    parallel_ranges(rows, 4 * head_.classes * losses_.branches(),
                    [&](int64_t begin, int64_t end) { residual_rows(begin, end, branches); });

    for (int64_t i = 0; i < head_.modalities(); ++i) {
      if (!grad_features_[i]) continue;
      const MatrixView grad = grad_features_[i]->row_block(first_row, rows);
      matmul(matrix(feature_plane(i)), head_.weights[i], grad);
      const bool* present = losses_.present(i);
      clear_absent(0, rows, present != nullptr ? present + first_row : nullptr, grad);
    }
    for (int64_t i = 0; i < head_.modalities(); ++i) {
      if (!grad_weights_[i]) continue;
      const MatrixView residual = matrix(weight_plane(i)).transposed();
      const MatrixView feature = features_[i].row_block(first_row, rows);
      matmul(residual, feature, *grad_weights_[i], /*add=*/first_row > 0);
    }
    if (!Needs::any(needs_.biases)) return;
    parallel_ranges(head_.classes, rows,
                    [&](int64_t begin, int64_t end) { add_biases(begin, end); });
  }

  // From products to residuals.
  void residual_rows(int64_t begin, int64_t end, const std::vector<LogitsBranch<T>>& branches) {
    const int64_t classes = head_.classes;
    for_cached_rows(begin, end, classes, [&](int64_t first, int64_t last) {
      combine_logits<T>(first, last, classes, branches.data(), branches.size(), fused_bias_.data(),
                        plane(0));
      losses_.add_rows<T>(first, last, 0, fused_residual_, plane(0));
      for (int64_t i = 0; i < head_.modalities(); ++i) {
        const bool residual = needs_.features[i] || (head_leak_ != 0 && needs_.head());
        losses_.add_rows<T>(first, last, i + 1, residual, plane(i + 1));
        if (mixes_features_) mix_planes(first, last, i + 1, 0, encoder_leak_, feature_plane(i));
        if (mixes_weights_) mix_planes(first, last, 0, i + 1, head_leak_, weight_plane(i));
      }
    });
  }

  void mix_planes(int64_t begin, int64_t end, int64_t whole, int64_t leaking, double leak, T* out) {
    const Term<T> terms[2] = {{row_major(plane(whole)), T(1)},
                              {row_major(plane(leaking)), static_cast<T>(leak)}};
    mix<T>(begin, end, head_.classes, terms, 2, out);
  }

  // The shared bias is in every modality's logits, a bias of one modality in its own.
  std::vector<Term<T>> bias_terms(size_t b) const {
    std::vector<Term<T>> terms{{row_major(plane(0)), T(1)}};
    for (int64_t i = 0; head_leak_ != 0 && i < head_.modalities(); ++i) {
      if (head_.shared || i == static_cast<int64_t>(b)) {
        terms.push_back({row_major(plane(i + 1)), static_cast<T>(head_leak_)});
      }
    }
    return terms;
  }

  Strided<T> row_major(const T* data) const { return {data, head_.classes, 1}; }

  const LinearArguments& head_;
  const Needs& needs_;
  BranchLosses& losses_;
  double encoder_leak_;
  double head_leak_;
  std::vector<T> fused_bias_;
  std::vector<Tensor> bias_rows_;
  std::vector<MatrixView> features_;  // absent rows are zero
  bool fused_residual_;
  bool mixes_features_;
  bool mixes_weights_;
  int64_t chunk_;
  bool dots_;
  bool by_rows_;
  std::unique_ptr<T[]> workspace_;
  std::vector<std::vector<double>> bias_totals_;
  std::vector<std::optional<MatrixView>> grad_features_;
  std::vector<std::optional<MatrixView>> grad_weights_;  // per modality
  int64_t rows_ = 0;                                     // of the chunk
};

struct LinearStepOp {
  static constexpr const char* kName = "linear_head_step";
  static constexpr auto kParse = parse_linear_head;
  template <typename T>
  using Step = LinearStep<T>;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgl_ext, CPU, m) {
  m.impl(LinearStepOp::kName, DGL_EXT_CPU_OP(&step<LinearStepOp>));
}

}  // namespace dgl_ext::cpu
