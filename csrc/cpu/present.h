// Rows without a modality on the CPU: their features count as zero and are not read.

#pragma once

#include <algorithm>
#include <vector>

#include "cpu/matrix.h"

namespace dgl_ext::cpu {

// The data of a tensor of one element per row. `held` keeps it alive.
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

// Zeros in a range of a gradient's rows, where the feature is absent.
inline void clear_absent(int64_t begin, int64_t end, const bool* present, const MatrixView& grad) {
  if (present == nullptr) return;
  dispatch_dtype(grad.dtype(), [&](auto type) {
    using T = decltype(type);
    for (int64_t r = begin; r < end; ++r) {
      if (!present[r]) std::fill_n(grad.data<T>() + r * grad.row_stride(), grad.cols, T(0));
    }
  });
}

}  // namespace dgl_ext::cpu
