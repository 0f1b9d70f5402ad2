// The three products of a head where they are too small for a library GEMM: up to a few million
// multiply-adds, a library spends more on its call, on packing and on waking threads than on the
// arithmetic. Free of torch, like row_passes.h.
//
// Vectors are GCC's portable ones. Where the processor has AVX2 and FMA, the same body is compiled
// for them and chosen at run time, so that one wheel serves all processors.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/row_passes.h"

namespace dgl_ext {
namespace small_gemm {

template <typename T>
struct Lanes {
  static constexpr int64_t kCount = 32 / sizeof(T);
  typedef T Vector __attribute__((vector_size(32)));
};

#define DGL_EXT_INLINE inline __attribute__((always_inline))

template <typename T>
DGL_EXT_INLINE void load(typename Lanes<T>::Vector& vector, const T* data) {
  std::memcpy(&vector, data, sizeof(vector));
}

// out[r, c] = sum_k x[r, k] w[c, k], for a range of rows; out is row-major.
template <typename T>
DGL_EXT_INLINE void rows_by_rows(int64_t row_begin, int64_t row_end, int64_t classes, int64_t width,
                                 const Strided<T>& x, const Strided<T>& w, T* out) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  constexpr int64_t kBlock = 8;
  const int64_t whole = width / kLanes * kLanes;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* x_row = x.row(r);
    for (int64_t begin = 0; begin < classes; begin += kBlock) {
      const int64_t count = std::min(kBlock, classes - begin);
      const T* w_rows[kBlock];
      // A short block computes its last row again rather than branch in the inner loop.
      for (int64_t c = 0; c < kBlock; ++c) w_rows[c] = w.row(begin + std::min(c, count - 1));
      Vector sums[kBlock] = {};
      for (int64_t k = 0; k < whole; k += kLanes) {
        Vector x_part;
        load<T>(x_part, x_row + k);
        for (int64_t c = 0; c < kBlock; ++c) {
          Vector w_part;
          load<T>(w_part, w_rows[c] + k);
          sums[c] += x_part * w_part;
        }
      }
      for (int64_t c = 0; c < count; ++c) {
        T total = 0;
        for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[c][lane];
        for (int64_t k = whole; k < width; ++k) total += x_row[k] * w_rows[c][k];
        out[r * classes + begin + c] = total;
      }
    }
  }
}

// out[i, k] = sum_j a(i, j) b[j, k] for k in a range of columns and `block` rows i, in registers.
template <typename T, int64_t kRows, int64_t kVectors>
DGL_EXT_INLINE void tile(int64_t count, const T* const* a, int64_t a_stride, const Strided<T>& b,
                         int64_t column, T* const* out) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  Vector sums[kRows][kVectors] = {};
  for (int64_t j = 0; j < count; ++j) {
    Vector parts[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) load<T>(parts[v], b.row(j) + column + v * kLanes);
    for (int64_t i = 0; i < kRows; ++i) {
      const T factor = a[i][j * a_stride];
      for (int64_t v = 0; v < kVectors; ++v) sums[i][v] += factor * parts[v];
    }
  }
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t v = 0; v < kVectors; ++v) {
      std::memcpy(out[i] + column + v * kLanes, &sums[i][v], sizeof(Vector));
    }
  }
}

// out[i, k] = sum_j a[i, j] b[j, k] for ranges of rows and columns; a has any strides (a transposed
// view included), the rows of b and out are contiguous.
template <typename T>
DGL_EXT_INLINE void product(int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                            int64_t count, const Strided<T>& a, const Strided<T>& b, T* out,
                            int64_t out_stride) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  constexpr int64_t kRows = 4;
  constexpr int64_t kVectors = 2;
  for (int64_t begin = row_begin; begin < row_end; begin += kRows) {
    const int64_t rows = std::min(kRows, row_end - begin);
    const T* a_rows[kRows];
    T* out_rows[kRows];
    // A short block computes its last row again, and writes it where it belongs.
    for (int64_t i = 0; i < kRows; ++i) {
      const int64_t r = begin + std::min(i, rows - 1);
      a_rows[i] = a.row(r);
      out_rows[i] = out + r * out_stride;
    }
    int64_t k = col_begin;
    for (; k + kVectors * kLanes <= col_end; k += kVectors * kLanes) {
      tile<T, kRows, kVectors>(count, a_rows, a.col_stride, b, k, out_rows);
    }
    for (; k + kLanes <= col_end; k += kLanes) {
      tile<T, kRows, 1>(count, a_rows, a.col_stride, b, k, out_rows);
    }
    for (; k < col_end; ++k) {
      for (int64_t i = 0; i < rows; ++i) {
        T sum = 0;
        for (int64_t j = 0; j < count; ++j) sum += a_rows[i][j * a.col_stride] * b.row(j)[k];
        out_rows[i][k] = sum;
      }
    }
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
#define DGL_EXT_TARGET_FMA __attribute__((target("avx2,fma")))
inline bool has_fma() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
#else
#define DGL_EXT_TARGET_FMA
inline bool has_fma() { return false; }
#endif

template <typename T>
DGL_EXT_TARGET_FMA void rows_by_rows_fma(int64_t row_begin, int64_t row_end, int64_t classes,
                                         int64_t width, const Strided<T>& x, const Strided<T>& w,
                                         T* out) {
  rows_by_rows<T>(row_begin, row_end, classes, width, x, w, out);
}

template <typename T>
DGL_EXT_TARGET_FMA void product_fma(int64_t row_begin, int64_t row_end, int64_t col_begin,
                                    int64_t col_end, int64_t count, const Strided<T>& a,
                                    const Strided<T>& b, T* out, int64_t out_stride) {
  product<T>(row_begin, row_end, col_begin, col_end, count, a, b, out, out_stride);
}

}  // namespace small_gemm

// out[r, c] = sum_k x[r, k] w[c, k] for a range of rows. The rows of x and w are contiguous, out is
// row-major with `classes` columns.
template <typename T>
void small_rows_by_rows(int64_t row_begin, int64_t row_end, int64_t classes, int64_t width,
                        const Strided<T>& x, const Strided<T>& w, T* out) {
  auto* body =
      small_gemm::has_fma() ? small_gemm::rows_by_rows_fma<T> : small_gemm::rows_by_rows<T>;
  body(row_begin, row_end, classes, width, x, w, out);
}

// out[i, k] = sum_j a[i, j] b[j, k] for ranges of rows and columns. The rows of b and out are
// contiguous; a has any strides.
template <typename T>
void small_product(int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                   int64_t count, const Strided<T>& a, const Strided<T>& b, T* out,
                   int64_t out_stride) {
  auto* body = small_gemm::has_fma() ? small_gemm::product_fma<T> : small_gemm::product<T>;
  body(row_begin, row_end, col_begin, col_end, count, a, b, out, out_stride);
}

}  // namespace dgl_ext
