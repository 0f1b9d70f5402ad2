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

// The sum over a vector's lanes, halves onto halves.
DGL_EXT_INLINE float lane_sum(const Lanes<float>::Vector& v) {
  typedef int32_t Order __attribute__((vector_size(32)));
  Lanes<float>::Vector sum = v + __builtin_shuffle(v, Order{4, 5, 6, 7, 0, 1, 2, 3});
  sum += __builtin_shuffle(sum, Order{2, 3, 0, 1, 6, 7, 4, 5});
  return sum[0] + sum[1];
}
DGL_EXT_INLINE double lane_sum(const Lanes<double>::Vector& v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}

// kRows x kClasses outputs of rows_by_rows, in registers.
template <typename T, int64_t kRows, int64_t kClasses>
DGL_EXT_INLINE void dot_tile(int64_t width, const T* const* x, const T* const* w, T* const* out) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const int64_t whole = width / kLanes * kLanes;
  Vector sums[kRows][kClasses] = {};
  for (int64_t k = 0; k < whole; k += kLanes) {
    Vector w_parts[kClasses];
#pragma GCC unroll 8
    for (int64_t c = 0; c < kClasses; ++c) load<T>(w_parts[c], w[c] + k);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      Vector x_part;
      load<T>(x_part, x[r] + k);
#pragma GCC unroll 8
      for (int64_t c = 0; c < kClasses; ++c) sums[r][c] += x_part * w_parts[c];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int64_t c = 0; c < kClasses; ++c) {
      T total = lane_sum(sums[r][c]);
      for (int64_t k = whole; k < width; ++k) total += x[r][k] * w[c][k];
      out[r][c] = total;
    }
  }
}

// out[r, c] = sum_k x[r, k] w[c, k], for a range of rows; out is row-major.
template <typename T>
DGL_EXT_INLINE void rows_by_rows(int64_t row_begin, int64_t row_end, int64_t classes, int64_t width,
                                 const Strided<T>& x, const Strided<T>& w, T* out) {
  constexpr int64_t kRows = 4;
  constexpr int64_t kClasses = 3;
  constexpr int64_t kCached = 8;  // rows of x that stay in cache while w passes by once
  for (int64_t first = row_begin; first < row_end; first += kCached) {
    const int64_t last = std::min(row_end, first + kCached);
    for (int64_t c = 0; c < classes; c += kClasses) {
      // A short tile computes its last row or class again rather than branch in the inner loop;
      // what is computed twice is written twice.
      const T* w_rows[kClasses];
      for (int64_t k = 0; k < kClasses; ++k) w_rows[k] = w.row(std::min(c + k, classes - 1));
      for (int64_t r = first; r < last; r += kRows) {
        const T* x_rows[kRows];
        T results[kRows][kClasses];
        T* result_rows[kRows];
        for (int64_t k = 0; k < kRows; ++k) {
          x_rows[k] = x.row(std::min(r + k, last - 1));
          result_rows[k] = results[k];
        }
        if (last - r > 1) {
          dot_tile<T, kRows, kClasses>(width, x_rows, w_rows, result_rows);
        } else {
          dot_tile<T, 1, kClasses>(width, x_rows, w_rows, result_rows);
        }
        for (int64_t i = 0; i < std::min(kRows, last - r); ++i) {
          for (int64_t k = 0; k < std::min(kClasses, classes - c); ++k) {
            out[(r + i) * classes + c + k] = results[i][k];
          }
        }
      }
    }
  }
}

// out[i, k] = sum_j a[i, j] b[j, k] for kRows rows and kVectors vectors of columns, in registers.
template <typename T, int64_t kRows, int64_t kVectors>
DGL_EXT_INLINE void tile(int64_t count, const Strided<T>& a, const T* b, int64_t b_stride, T* out,
                         int64_t out_stride) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  Vector sums[kRows][kVectors] = {};
  const T* a_part = a.data;
  for (int64_t j = 0; j < count; ++j, a_part += a.col_stride, b += b_stride) {
    Vector parts[kVectors];
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v) load<T>(parts[v], b + v * kLanes);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kRows; ++i) {
      const T factor = a_part[i * a.row_stride];
#pragma GCC unroll 2
      for (int64_t v = 0; v < kVectors; ++v) sums[i][v] += factor * parts[v];
    }
  }
#pragma GCC unroll 6
  for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v) {
      std::memcpy(out + i * out_stride + v * kLanes, &sums[i][v], sizeof(Vector));
    }
  }
}

// The operands of a product, as its inner loops pass them on; b is at the first of the columns.
template <typename T>
struct ProductPart {
  int64_t count;
  Strided<T> a;
  const T* b;
  int64_t b_stride;
  T* out;
  int64_t out_stride;
};

// kRows rows from `row` on, for the columns from `begin` to `end`, whole vectors.
template <typename T, int64_t kRows>
DGL_EXT_INLINE void row_block(int64_t row, int64_t begin, int64_t end, const ProductPart<T>& p) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const Strided<T> a{p.a.row(row), p.a.row_stride, p.a.col_stride};
  const T* b = p.b;
  T* out = p.out + row * p.out_stride;
  int64_t k = begin;
  for (; k + 2 * kLanes <= end; k += 2 * kLanes, b += 2 * kLanes) {
    tile<T, kRows, 2>(p.count, a, b, p.b_stride, out + k, p.out_stride);
  }
  if (k < end) tile<T, kRows, 1>(p.count, a, b, p.b_stride, out + k, p.out_stride);
}

template <typename T>
DGL_EXT_INLINE void all_rows(int64_t row_begin, int64_t row_end, int64_t begin, int64_t end,
                             const ProductPart<T>& p) {
  int64_t row = row_begin;
  for (; row + 6 <= row_end; row += 6) row_block<T, 6>(row, begin, end, p);
  switch (row_end - row) {
    case 5:
      return row_block<T, 5>(row, begin, end, p);
    case 4:
      return row_block<T, 4>(row, begin, end, p);
    case 3:
      return row_block<T, 3>(row, begin, end, p);
    case 2:
      return row_block<T, 2>(row, begin, end, p);
    case 1:
      return row_block<T, 1>(row, begin, end, p);
    default:
      return;
  }
}

// out[i, k] = sum_j a[i, j] b[j, k] for ranges of rows and columns; a has any strides (a transposed
// view included), the rows of b and out are contiguous.
template <typename T>
DGL_EXT_INLINE void product(int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                            int64_t count, const Strided<T>& a, const Strided<T>& b, T* out,
                            int64_t out_stride) {
  constexpr int64_t kLanes = Lanes<T>::kCount;
  constexpr int64_t kWidth = 2 * kLanes;
  // Where many rows read the same columns of b, these are copied side by side first: rows of b
  // often lie a power of two apart, and more than a few would fall on one another in the cache.
  constexpr int64_t kManyRows = 12;
  constexpr int64_t kFewInputs = 8;
  constexpr int64_t kPacked = 512;
  T packed[kPacked * kWidth];
  int64_t k = col_begin + (col_end - col_begin) / kLanes * kLanes;  // whole vectors end here
  if (row_end - row_begin > kManyRows && count > kFewInputs && count <= kPacked) {
    for (int64_t begin = col_begin; begin < k; begin += kWidth) {
      const int64_t width = std::min(kWidth, k - begin);
      for (int64_t j = 0; j < count; ++j) {
        std::memcpy(packed + j * kWidth, b.row(j) + begin, width * sizeof(T));
      }
      all_rows<T>(row_begin, row_end, begin, begin + width,
                  {count, a, packed, kWidth, out, out_stride});
    }
  } else {
    all_rows<T>(row_begin, row_end, col_begin, k,
                {count, a, b.data + col_begin, b.row_stride, out, out_stride});
  }
  for (; k < col_end; ++k) {
    for (int64_t i = row_begin; i < row_end; ++i) {
      const T* a_row = a.row(i);
      T sum = 0;
      for (int64_t j = 0; j < count; ++j) sum += a_row[j * a.col_stride] * b.row(j)[k];
      out[i * out_stride + k] = sum;
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
