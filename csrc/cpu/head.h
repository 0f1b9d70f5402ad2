// What all heads share on the CPU: their arguments as matrices, the gradients that they are asked
// for, rows that lack a modality, and the op that returns logits.

#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/matrix.h"

namespace dgl_ext::cpu {

// The data of a tensor whose elements lie one after the other. `held` keeps it alive.
template <typename T>
const T* flat_data(const Tensor& tensor, std::vector<Tensor>& held) {
  held.push_back(to_contiguous(tensor));
  return static_cast<const T*>(held.back().const_data_ptr());
}

// Per modality one flag a row; null where no row lacks it.
class Masks {
 public:
  Masks(const OptionalTensors& present, int64_t modalities, int64_t rows)
      : flags_(modalities, nullptr) {
    for (size_t i = 0; i < present.size(); ++i) {
      if (!present[i]) continue;
      const bool* flags = flat_data<bool>(*present[i], held_);
      if (!std::all_of(flags, flags + rows, [](bool there) { return there; })) flags_[i] = flags;
    }
  }

  const bool* operator[](int64_t modality) const { return flags_[modality]; }

 private:
  std::vector<Tensor> held_;
  std::vector<const bool*> flags_;
};

// A copy of a feature in which absent rows are zero, whatever is stored there; the feature itself
// where no row is absent.
inline MatrixView select_present(const MatrixView& feature, const bool* present) {
  if (present == nullptr) return feature;
  const MatrixView out = empty_matrix(feature.rows, feature.cols, feature.dtype());
  dispatch_dtype(feature.dtype(), [&](auto type) {
    using T = decltype(type);
    const Strided<T> from = feature.strided<T>();
    T* to = out.data<T>();
    parallel_ranges(feature.rows, feature.cols, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* row = from.row(r);
        T* out_row = to + r * feature.cols;
        for (int64_t c = 0; c < feature.cols; ++c) {
          out_row[c] = present[r] ? row[c * from.col_stride] : T(0);
        }
      }
    });
  });
  return out;
}

// Zeros in a gradient's rows where the feature is absent.
inline void clear_absent(const bool* present, const MatrixView& grad) {
  if (present == nullptr) return;
  dispatch_dtype(grad.dtype(), [&](auto type) {
    using T = decltype(type);
    parallel_ranges(grad.rows, grad.cols, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (!present[r]) std::fill_n(grad.data<T>() + r * grad.row_stride(), grad.cols, T(0));
      }
    });
  });
}

template <class Sizes>
struct HeadArguments : Sizes {
  ScalarType storage;  // of the arguments
  ScalarType compute;
  Masks masks;
  std::vector<MatrixView> features;  // absent rows are zero
  std::vector<MatrixView> weights;

  int64_t modalities() const { return static_cast<int64_t>(features.size()); }
};

// After all checks, of which `sizes` are a result.
template <class Sizes>
HeadArguments<Sizes> as_matrices(const Sizes& sizes, const std::vector<Tensor>& features,
                                 const std::vector<Tensor>& weights,
                                 const OptionalTensors& present) {
  const auto matrix = [](const Tensor& of) { return MatrixView::from_rows(to_compute(of)); };
  const ScalarType storage = features[0].scalar_type();
  HeadArguments<Sizes> head{
      sizes, storage, compute_dtype(storage), Masks(present, features.size(), sizes.rows), {}, {}};
  for (size_t i = 0; i < features.size(); ++i) {
    head.features.push_back(select_present(matrix(features[i]), head.masks[i]));
  }
  for (const Tensor& weight : weights) head.weights.push_back(matrix(weight));
  return head;
}

inline void set_zero(const MatrixView& matrix) {
  Tensor view = matrix.view();
  torch::stable::zero_(view);
}

// The gradients that a call is asked for, in the compute dtype: matrices to write to, and the sums
// over rows that biases get, which are to be added to.
class Gradients {
 public:
  std::vector<std::optional<MatrixView>> features, weights;
  std::vector<std::optional<std::vector<double>>> biases;

  Gradients() = default;
  template <class Sizes>
  Gradients(const HeadArguments<Sizes>& head, const Needs& needs) : dtype_(head.compute) {
    for (size_t i = 0; i < head.features.size(); ++i) {
      features.push_back(add(needs.features[i], head.with(head.features[i].cols)));
    }
    for (size_t w = 0; w < head.weights.size(); ++w) {
      const MatrixView& weight = head.weights[w];
      weights.push_back(add(needs.weights[w], {weight.rows, weight.cols}));
      biases.emplace_back();
      if (needs.biases[w]) biases.back() = std::vector<double>(weight.rows, 0.0);
    }
  }

  // As tensors: features', weights', biases'.
  std::vector<Tensor> results(const Masks& masks) const {
    for (size_t i = 0; i < features.size(); ++i) {
      if (features[i]) clear_absent(masks[i], *features[i]);
    }
    std::vector<Tensor> results = tensors_;
    for (const auto& totals : biases) {
      if (totals) results.push_back(rounded(*totals, dtype_));
    }
    return results;
  }

 private:
  std::optional<MatrixView> add(bool needed, const Shape& shape) {
    if (!needed) return std::nullopt;
    tensors_.push_back(empty_cpu(shape, dtype_));
    return MatrixView::from_rows(tensors_.back());
  }

  ScalarType dtype_;
  std::vector<Tensor> tensors_;
};

// The op of one head that returns logits. `Head` has its ops' names, what checks its arguments, and
// the class that does a call.
template <class Head>
std::vector<Tensor> forward(std::vector<Tensor> features, std::vector<Tensor> weights,
                            OptionalTensors biases, OptionalTensors present, bool /* allow_tf32 */,
                            int64_t executor) {
  const Checks checks(Head::kForward);
  checks.executor(executor);
  const auto sizes = (checks.*Head::kSizes)(features, weights);
  checks.biases(biases, weights, features[0]);
  checks.masks(present, features.size(), sizes.leading, features[0]);
  const auto head = as_matrices(sizes, features, weights, present);
  return dispatch_dtype(head.compute, [&](auto type) {
    return typename Head::template Call<decltype(type)>(head, biases).forward();
  });
}

}  // namespace dgl_ext::cpu
