// Tensors as matrices, and products of views of them: our own (matmul.h), or the library's through
// torch's C shims, which call it without the dispatcher (quicker) and take the scalars of addmm
// (the stable ABI's dispatcher call does not).
//
// Heads on the CPU compute in float64 or float32 only: float16 and bfloat16 are converted at the
// op's border (`to_compute`, `to_storage`), so that sums over modalities and rows are never rounded
// to 16 bits in between, and since torch's float16 GEMM on a CPU can be 100 times slower.

#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/torch_errors.h"
#include "cpu/matmul.h"
#include "cpu/row_passes.h"

namespace dgl_ext {

inline Tensor to_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

inline Tensor to_compute(const Tensor& tensor) {
  return to_dtype(tensor, compute_dtype(tensor.scalar_type()));
}

inline std::vector<Tensor> to_storage(std::vector<Tensor> tensors, ScalarType dtype) {
  for (Tensor& tensor : tensors) tensor = to_dtype(tensor, dtype);
  return tensors;
}

// An uninitialised row-major CPU tensor. Not by torch::stable::empty, which looks its op up by
// name: a step makes seven tensors, and that would be a tenth of a small one.
inline Tensor empty_cpu(const Shape& shape, ScalarType dtype) {
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(1, shape[i]);
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), /*device_index=*/0, &handle));
  return Tensor(handle);
}

// Memory without values for intermediates; where there is none left, torch's own words.
template <typename T>
std::unique_ptr<T[]> allocate(int64_t count) {
  std::unique_ptr<T[]> memory(new (std::nothrow) T[count]);
  if (memory) return memory;
  throw std::runtime_error("DefaultCPUAllocator: can't allocate memory: you tried to allocate " +
                           std::to_string(count * int64_t(sizeof(T))) + " bytes.");
}

inline Tensor to_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// What f returns for a value of the C++ type of a compute dtype.
template <typename F>
auto dispatch_dtype(ScalarType dtype, const F& f) {
  return dtype == ScalarType::Double ? f(double{}) : f(float{});
}

// A view of rows x cols elements of a compute dtype.
class MatrixView {
 public:
  int64_t rows;
  int64_t cols;

  // (..., D) as a matrix of one row per sample, which keeps the tensor alive; copies only if no
  // single row stride reaches them.
  static MatrixView from_rows(const Tensor& tensor) {
    const int64_t last = tensor.dim() - 1;
    const int64_t cols = tensor.size(last);
    int64_t row_stride = std::max<int64_t>(1, cols), col_stride = 1;
    if (tensor.numel() > 0) {  // else it has any strides
      const std::optional<int64_t> single = single_row_stride(tensor);
      if (!single) return from_rows(torch::stable::contiguous(tensor));
      row_stride = *single;
      col_stride = tensor.stride(last);
    }
    // Inputs are only read, and results are ours: nothing is written that is copied on write.
    return MatrixView(const_cast<void*>(tensor.const_data_ptr()), leading_count(shape_of(tensor)),
                      cols, row_stride, col_stride, tensor.scalar_type(), tensor);
  }

  // A row-major matrix on memory that the caller keeps alive.
  static MatrixView from_memory(void* data, int64_t rows, int64_t cols, ScalarType dtype) {
    return MatrixView(data, rows, cols, std::max<int64_t>(1, cols), 1, dtype, std::nullopt);
  }

  MatrixView transposed() const {
    return MatrixView(data_, cols, rows, col_stride_, row_stride_, dtype_, owner_);
  }
  MatrixView columns(int64_t begin, int64_t count) const {
    return MatrixView(at(begin * col_stride_), rows, count, row_stride_, col_stride_, dtype_,
                      owner_);
  }
  MatrixView row_block(int64_t begin, int64_t count) const {
    return MatrixView(at(begin * row_stride_), count, cols, row_stride_, col_stride_, dtype_,
                      owner_);
  }

  template <typename T>
  T* data() const {
    return static_cast<T*>(data_);
  }
  template <typename T>
  Strided<T> strided() const {
    return {data<T>(), row_stride_, col_stride_};
  }

  int64_t row_stride() const { return row_stride_; }
  bool has_contiguous_rows() const { return col_stride_ == 1; }
  ScalarType dtype() const { return dtype_; }

  // A tensor on the same memory. It is made from the address: a view by an op would cost more and
  // carry autograd state along.
  Tensor view() const {
    const std::array<int64_t, 2> sizes{rows, cols};
    const std::array<int64_t, 2> strides{row_stride_, col_stride_};
    return torch::stable::from_blob(
        data_, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype_);
  }

 private:
  MatrixView(void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride,
             ScalarType dtype, std::optional<Tensor> owner)
      : rows(rows),
        cols(cols),
        data_(data),
        row_stride_(row_stride),
        col_stride_(col_stride),
        dtype_(dtype),
        owner_(std::move(owner)) {}

  void* at(int64_t element) const {
    const int64_t size = dtype_ == ScalarType::Double ? sizeof(double) : sizeof(float);
    return static_cast<char*>(data_) + element * size;
  }

  void* data_;
  int64_t row_stride_;
  int64_t col_stride_;
  ScalarType dtype_;
  std::optional<Tensor> owner_;
};

inline MatrixView empty_matrix(int64_t rows, int64_t cols, ScalarType dtype) {
  return MatrixView::from_rows(empty_cpu({rows, cols}, dtype));
}

// Up to here a head counts as narrow.
constexpr int64_t kFewOutputs = 64;

// out = a b, or out += a b, by the library
inline void blas_matmul(const MatrixView& a, const MatrixView& b, const MatrixView& out,
                        bool add = false) {
  if (out.rows == 0 || out.cols == 0) return;
  const Tensor to = out.view();
  if (add) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(to.get(), to.get(), a.view().get(),
                                                    b.view().get(), /*beta=*/1, /*alpha=*/1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(to.get(), a.view().get(), b.view().get()));
  }
}

// Rows or columns in ranges over torch's threads, none so small that starting it costs more.
template <typename F>
void parallel_ranges(int64_t count, int64_t elements_each, const F& f) {
  constexpr int64_t kMinElements = 32768;
  const int64_t grain = std::max<int64_t>(1, kMinElements / std::max<int64_t>(1, elements_each));
  torch::stable::parallel_for(0, count, grain, f);
}

// Up to here a call of the library costs more than it saves, whatever the shape.
constexpr int64_t kFewMultiplyAdds = int64_t{1} << 21;

// A matrix with a vector, or two vectors: the library reads and writes as fast as memory does.
inline bool is_vector_product(int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kMultiplyAdds = int64_t{1} << 14;
  if (m * n * k <= kMultiplyAdds) return false;
  if (k == 1) return std::min(m, n) >= 64;
  return std::min(m, n) == 1 && std::min(std::max(m, n), k) >= 8;
}

// Whether our own products may run at all: not under DGL_EXT_CPU_MATMUL=torch.
inline bool may_run_own() {
  static const bool own = [] {
    const char* value = std::getenv("DGL_EXT_CPU_MATMUL");
    if (value == nullptr || std::strcmp(value, "own") == 0) return true;
    if (std::strcmp(value, "torch") == 0) return false;
    throw std::runtime_error("DGL_EXT_CPU_MATMUL: expected \"own\" or \"torch\", got \"" +
                             std::string(value) + "\"");
  }();
  return own;
}

// Whether our own blocked product replaces the library's: where it was timed (on two cores) and was
// faster. Every thread packs for itself, which must be little beside what it then computes.
inline bool prefers_packed(int64_t m, int64_t n, int64_t k) {
  constexpr int64_t kMostMultiplyAdds = int64_t{1} << 32;
  constexpr int64_t kOutputsEach = 64;
  if (!may_run_own() || is_vector_product(m, n, k)) return false;
  if (m * n * k <= kFewMultiplyAdds) return true;
  return isa() != Isa::kPortable && m * n * k <= kMostMultiplyAdds &&
         std::max(m, n) >= kOutputsEach * torch::stable::get_num_threads();
}

// out = a b, or out += a b
inline void matmul(const MatrixView& a, const MatrixView& b, const MatrixView& out,
                   bool add = false) {
  if (!prefers_packed(a.rows, b.cols, a.cols)) {
    blas_matmul(a, b, out, add);
    return;
  }
  dispatch_dtype(out.dtype(), [&](auto type) {
    using T = decltype(type);
    const Strided<T> strides = out.strided<T>();
    const MatmulOutput<T> to{out.data<T>(), strides.row_stride, strides.col_stride, add};
    // Cut along the longer side, columns in whole vectors.
    constexpr int64_t kVectors = 64;
    const bool by_rows = out.rows >= out.cols;
    const int64_t unit = by_rows ? 1 : kVectors;
    const int64_t longer = by_rows ? out.rows : out.cols;
    const int64_t shorter = by_rows ? out.cols : out.rows;
    parallel_ranges(
        (longer + unit - 1) / unit, unit * shorter * a.cols / 8, [&](int64_t first, int64_t last) {
          const int64_t begin = first * unit;
          const int64_t end = std::min(longer, last * unit);
          matmul_packed<T>(by_rows ? begin : 0, by_rows ? end : out.rows, by_rows ? 0 : begin,
                           by_rows ? out.cols : end, a.cols, a.strided<T>(), b.strided<T>(), to);
        });
  });
}

constexpr int64_t kFewLogits = 32768;

// Whether linear may use a scratch matrix of the size of its result.
inline bool may_flip(int64_t rows, int64_t outputs) {
  return outputs <= kFewOutputs || rows * outputs <= kFewLogits;
}

// x w^T for a weight of `w.rows` outputs. `out`, which is row-major, may be returned, or a scratch
// matrix with the rows along the other axis: with few outputs, or few logits, the library is 1.1 to
// 1.5 times faster that way round, and the pass over the logits that follows reads either.
inline MatrixView linear(const MatrixView& x, const MatrixView& w, const MatrixView& out) {
  if (may_run_own() && w.rows <= kFewOutputs && x.cols <= kLongestDots && x.has_contiguous_rows() &&
      w.has_contiguous_rows() && x.rows * w.rows * x.cols <= kFewMultiplyAdds) {
    dispatch_dtype(out.dtype(), [&](auto type) {
      using T = decltype(type);
      parallel_ranges(x.rows, w.rows * x.cols, [&](int64_t begin, int64_t end) {
        matmul_dots<T>(begin, end, w.rows, x.cols, x.strided<T>(), w.strided<T>(), out.data<T>());
      });
    });
    return out;
  }
  if (prefers_packed(w.rows, x.rows, x.cols)) {
    matmul(w, x.transposed(), out.transposed());
    return out;
  }
  if (!may_flip(x.rows, w.rows)) {
    blas_matmul(x, w.transposed(), out);
    return out;
  }
  const MatrixView flipped = empty_matrix(w.rows, x.rows, x.dtype());
  blas_matmul(w, x.transposed(), flipped);
  return flipped.transposed();
}

// A bias in the compute dtype, or zeros.
inline Tensor bias_or_zeros(const std::optional<Tensor>& bias, int64_t size, ScalarType dtype) {
  if (bias) return to_contiguous(to_compute(*bias));
  Tensor zeros = empty_cpu({size}, dtype);
  torch::stable::zero_(zeros);
  return zeros;
}

// totals[c] += the column sums of the terms: the gradient of a bias.
template <typename T>
void add_sums(const std::vector<Term<T>>& terms, int64_t rows, std::vector<double>& totals) {
  parallel_ranges(static_cast<int64_t>(totals.size()), rows, [&](int64_t begin, int64_t end) {
    add_column_sums<T>(begin, end, rows, terms.data(), terms.size(), totals.data());
  });
}

// Totals as a tensor.
inline Tensor rounded(const std::vector<double>& totals, ScalarType dtype) {
  Tensor out = empty_cpu({static_cast<int64_t>(totals.size())}, dtype);
  dispatch_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    std::copy(totals.begin(), totals.end(), static_cast<T*>(out.data_ptr()));
  });
  return out;
}

}  // namespace dgl_ext
