// Tensors (..., D) as matrices of one row per sample, for either device.

#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "common/checks.h"

namespace dgl_ext {

// The one stride that reaches every row of a tensor that is not empty, if there is one.
inline std::optional<int64_t> single_row_stride(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t last = tensor.dim() - 1;
  int64_t rows = 1;
  int64_t row_stride = sizes[last];
  for (int64_t d = last - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (rows == 1) {
      row_stride = strides[d];
    } else if (strides[d] != row_stride * rows) {
      return std::nullopt;
    }
    rows *= sizes[d];
  }
  return row_stride;
}

}  // namespace dgl_ext
