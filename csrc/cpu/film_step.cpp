// The training step of the FiLM head on the CPU: logits, losses and every gradient in one op. The
// three branches (fused, x alone, y alone) are stacked along the rows, so that W_o takes part in
// one product forward, one for the hidden rows' gradients and, where the head's leak is open, one
// for its own gradient.
//
// Hidden rows and logits of all rows are there at a time where they fit the workspace; else rows
// run in chunks, and the head's gradients are summed over the chunks.

#include <torch/csrc/stable/library.h>

#include "cpu/film_gradients.h"
#include "cpu/step.h"

namespace dgl_ext::cpu {
namespace {

template <typename T>
class FilmStep {
 public:
  FilmStep(const FilmArguments& head, const OptionalTensors& biases, const Needs& needs,
           BranchLosses& losses, double encoder_leak, double head_leak, int64_t workspace_limit)
      : head_(head),
        needs_(needs),
        losses_(losses),
        encoder_leak_(encoder_leak),
        head_leak_(head_leak),
        film_bias_(bias_or_zeros(biases[0], 2 * head.hidden, head.compute)),
        out_bias_(bias_or_zeros(biases[1], head.classes, head.compute)),
        x_(select_present(head.x, losses.present(0))),
        y_(select_present(head.y, losses.present(1))),
        film_bias_totals_(needs.biases[0] ? 2 * head.hidden : 0, 0.0),
        out_bias_totals_(needs.biases[1] ? head.classes : 0, 0.0) {
    const bool trains_head = needs.head();
    trains_film_ = needs.weights[0] || needs.biases[0];
    residual_ = {trains_head || (encoder_leak != 0 && Needs::any(needs.features)),
                 needs.features[0] || (head_leak != 0 && trains_head),
                 needs.features[1] || (head_leak != 0 && trains_head)};
    // [gamma | beta] and two of its gradients' planes; hidden rows and their gradients; logits, and
    // as much again where the product is put into a matrix of its own.
    const int64_t most = 6 * head.hidden + 2 * kBranches * (head.hidden + head.classes);
    chunk_ = chunk_rows(head.rows, most * static_cast<int64_t>(sizeof(T)), workspace_limit);
    film_ = plane(chunk_, 2 * head.hidden);
    hidden_ = plane(kBranches * chunk_, head.hidden);
    logits_ = plane(kBranches * chunk_, head.classes);
    if (Needs::any(needs.features) || trains_film_) {
      hidden_grads_ = plane(kBranches * chunk_, head.hidden);
      film_grad_ = plane(2 * chunk_, 2 * head.hidden);
    }
  }

  // In the compute dtype, in the order of the results.
  std::vector<Tensor> run(const std::vector<Tensor>& features, const std::vector<Tensor>& weights) {
    std::vector<Tensor> grads;
    const auto add = [&](bool needed, const Tensor& like) -> std::optional<MatrixView> {
      if (!needed) return std::nullopt;
      grads.push_back(empty_cpu(shape_of(like), head_.compute));
      return MatrixView::from_rows(grads.back());
    };
    grad_x_ = add(needs_.features[0], features[0]);
    grad_y_ = add(needs_.features[1], features[1]);
    grad_film_weight_ = add(needs_.weights[0], weights[0]);
    grad_out_weight_ = add(needs_.weights[1], weights[1]);
    for_chunks(head_.rows, chunk_, [&](int64_t begin, int64_t rows) { run_chunk(begin, rows); });
    if (needs_.biases[0]) grads.push_back(rounded(film_bias_totals_, head_.compute));
    if (needs_.biases[1]) grads.push_back(rounded(out_bias_totals_, head_.compute));
    return grads;
  }

 private:
  using Plane = std::unique_ptr<T[]>;

  static Plane plane(int64_t rows, int64_t cols) { return allocate<T>(rows * cols); }

  MatrixView matrix(T* data, int64_t rows, int64_t cols) const {
    return MatrixView::from_memory(data, rows, cols, head_.compute);
  }
  // The part of one branch in a stack of all three.
  T* part(const Plane& stack, int64_t branch, int64_t cols) const {
    return stack.get() + branch * rows_ * cols;
  }
  const T* film_bias() const { return static_cast<const T*>(film_bias_.const_data_ptr()); }

  void run_chunk(int64_t first_row, int64_t rows) {
    rows_ = rows;
    first_row_ = first_row;
    losses_.start_chunk(first_row);
    const MatrixView y = y_.row_block(first_row, rows);
    make_hidden(y.strided<T>());
    make_residuals();
    if (hidden_grads_) {
      make_hidden_grads();
      make_film_grads(y);
    }
    if (needs_.weights[1] || needs_.biases[1]) add_out_grads();
  }

  void make_hidden(const Strided<T>& y) {
    const int64_t hidden = head_.hidden;
    const MatrixView film = matrix(film_.get(), rows_, 2 * hidden);
    matmul(x_.row_block(first_row_, rows_), head_.film_weight.transposed(), film);
    const FilmHidden<T> out{part(hidden_, kFused, hidden), part(hidden_, kOfX, hidden),
                            part(hidden_, kOfY, hidden)};
    parallel_ranges(rows_, 6 * hidden, [&](int64_t begin, int64_t end) {
      add_bias<T>(begin, end, 2 * hidden, film.strided<T>(), film_bias(), film_.get());
      film_hidden<T>(begin, end, hidden, film_.get(), y, film_bias(), out);
    });
  }

  // The logits of all branches, and their residuals in their place.
  void make_residuals() {
    const int64_t classes = head_.classes;
    const MatrixView partial =
        linear(matrix(hidden_.get(), kBranches * rows_, head_.hidden), head_.out_weight,
               matrix(logits_.get(), kBranches * rows_, classes));
    const T* bias = static_cast<const T*>(out_bias_.const_data_ptr());
    parallel_ranges(rows_, 4 * kBranches * classes, [&](int64_t begin, int64_t end) {
      for (int64_t branch = 0; branch < kBranches; ++branch) {
        const auto in = partial.row_block(branch * rows_, rows_).template strided<T>();
        T* logits = part(logits_, branch, classes);
        for_cached_rows(begin, end, classes, [&](int64_t first, int64_t last) {
          add_bias<T>(first, last, classes, in, bias, logits);
          losses_.add_rows<T>(first, last, branch, residual_[branch], logits);
        });
      }
    });
  }

  // grad W_o of every branch that has residuals; neighbours in one product.
  void make_hidden_grads() {
    for (int64_t first = 0; first < kBranches;) {
      int64_t last = first;
      while (last < kBranches && residual_[last]) ++last;
      if (last > first) {
        matmul(
            matrix(part(logits_, first, head_.classes), (last - first) * rows_, head_.classes),
            head_.out_weight,
            matrix(part(hidden_grads_, first, head_.hidden), (last - first) * rows_, head_.hidden));
      }
      first = last + 1;
    }
  }

  // Of both features, W_f and b_f.
  void make_film_grads(const MatrixView& y) {
    const FilmGradients<T> grads(
        head_, x_.row_block(first_row_, rows_), y, film_.get(), film_bias(),
        {part(hidden_grads_, kFused, head_.hidden), part(hidden_grads_, kOfX, head_.hidden),
         part(hidden_grads_, kOfY, head_.hidden)},
        encoder_leak_, head_leak_, film_grad_.get());
    if (grad_x_) {
      const MatrixView out = grad_x_->row_block(first_row_, rows_);
      grads.grad_x(out);
      clear_absent_rows(0, out);
    }
    if (grad_y_) {
      const MatrixView out = grad_y_->row_block(first_row_, rows_);
      grads.grad_y(out);
      clear_absent_rows(1, out);
    }
    if (trains_film_) {
      grads.add_parameters(grad_film_weight_, /*add=*/first_row_ > 0, film_bias_totals_);
    }
  }

  void clear_absent_rows(int64_t modality, const MatrixView& grad) const {
    const bool* present = losses_.present(modality);
    if (present != nullptr) clear_absent(0, rows_, present + first_row_, grad);
  }

  // Of W_o and b_o: from the fused branch and, through the leak, the stack of all three. Nothing
  // reads the residuals after this, so the leak scales them in place.
  void add_out_grads() {
    const int64_t classes = head_.classes;
    const int64_t rows = head_leak_ != 0 ? kBranches * rows_ : rows_;
    if (head_leak_ != 0) {
      T* unimodal = part(logits_, kOfX, classes);
      const T leak = static_cast<T>(head_leak_);
      parallel_ranges(2 * rows_, classes, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin * classes; k < end * classes; ++k) unimodal[k] *= leak;
      });
    }
    const MatrixView residual = matrix(logits_.get(), rows, classes);
    if (grad_out_weight_) {
      matmul(residual.transposed(), matrix(hidden_.get(), rows, head_.hidden), *grad_out_weight_,
             /*add=*/first_row_ > 0);
    }
    if (needs_.biases[1]) {
      add_sums<T>({{residual.template strided<T>(), T(1)}}, rows, out_bias_totals_);
    }
  }

  const FilmArguments& head_;
  const Needs& needs_;
  BranchLosses& losses_;
  double encoder_leak_;
  double head_leak_;
  Tensor film_bias_;
  Tensor out_bias_;
  MatrixView x_;  // absent rows are zero
  MatrixView y_;
  std::vector<double> film_bias_totals_;
  std::vector<double> out_bias_totals_;
  bool trains_film_;
  std::array<bool, kBranches> residual_;
  int64_t chunk_;
  Plane film_;  // [gamma | beta]
  Plane hidden_;
  Plane logits_;
  Plane hidden_grads_;
  Plane film_grad_;
  std::optional<MatrixView> grad_x_;
  std::optional<MatrixView> grad_y_;
  std::optional<MatrixView> grad_film_weight_;
  std::optional<MatrixView> grad_out_weight_;
  int64_t rows_ = 0;  // of the chunk
  int64_t first_row_ = 0;
};

struct FilmStepOp {
  static constexpr const char* kName = "film_head_step";
  static constexpr auto kParse = parse_film_head;
  template <typename T>
  using Step = FilmStep<T>;
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgl_ext, CPU, m) {
  m.impl(FilmStepOp::kName, DGL_EXT_CPU_OP(&step<FilmStepOp>));
}

}  // namespace dgl_ext::cpu
