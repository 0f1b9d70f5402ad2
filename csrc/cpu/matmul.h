// CPU matmuls, used where we measured them faster than torch's BLAS. Small ones: BLAS loses to call
// overhead, packing and thread wake-up. Large ones: we split by rows, so that a row's logits, loss
// and gradient are computed while it is in cache. Free of torch.
//
// `matmul_dots`: both operands have contiguous rows and nothing is packed (few classes).
// `matmul_packed`: a panel of b is packed once, and every row of a passes it. Results do not depend
// on how rows and columns are split.

#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/row_passes.h"
#include "cpu/vectors.h"

namespace dgl_ext {

// Where a product goes: its values are set, or added to what is there.
template <typename T>
struct MatmulOutput {
  T* data;
  int64_t row_stride;
  int64_t col_stride = 1;
  bool add = false;
};

namespace matmul_bodies {

// The sum over a vector's lanes, halves onto halves.
DGL_EXT_INLINE float lane_sum(const Lanes<float>::Vector& v) {
  Lanes<float>::Vector sum = v + __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  sum += __builtin_shufflevector(sum, sum, 2, 3, 0, 1, 6, 7, 4, 5);
  return sum[0] + sum[1];
}
DGL_EXT_INLINE double lane_sum(const Lanes<double>::Vector& v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}

// Products of so few columns, and of as few rows or not many inputs, would leave vectors nearly
// empty.
constexpr int64_t kThin = 4;
constexpr int64_t kThinInputs = 16;

// The same sums by scalars: many rows side by side, or many inputs in several chains, in blocks.
template <typename T>
DGL_EXT_INLINE void thin(int64_t rows, int64_t cols, int64_t count, const Strided<T>& a,
                         const Strided<T>& b, const MatmulOutput<T>& out) {
  constexpr int64_t kBlock = 256;
  constexpr int64_t kChains = 8;
  for (int64_t k = 0; k < cols; ++k) {
    const Strided<T> column{b.data + k * b.col_stride, b.row_stride, 0};
    T* to = out.data + k * out.col_stride;
    if (rows <= kThin) {
      for (int64_t i = 0; i < rows; ++i) {
        const T* row = a.row(i);
        T total = out.add ? to[i * out.row_stride] : T(0);
        for (int64_t begin = 0; begin < count; begin += kBlock) {
          const int64_t end = std::min(count, begin + kBlock);
          T sums[kChains] = {};
          int64_t j = begin;
          for (; j + kChains <= end; j += kChains) {
            for (int64_t l = 0; l < kChains; ++l) {
              sums[l] += row[(j + l) * a.col_stride] * *column.row(j + l);
            }
          }
          for (; j < end; ++j) sums[0] += row[j * a.col_stride] * *column.row(j);
          total += ((sums[0] + sums[4]) + (sums[2] + sums[6])) +
                   ((sums[1] + sums[5]) + (sums[3] + sums[7]));
        }
        to[i * out.row_stride] = total;
      }
      continue;
    }
    for (int64_t begin = 0; begin < rows; begin += kBlock) {
      const int64_t many = std::min(kBlock, rows - begin);
      T sums[kBlock] = {};
      for (int64_t j = 0; j < count; ++j) {
        const T* values = a.row(begin) + j * a.col_stride;
        const T factor = *column.row(j);
        for (int64_t i = 0; i < many; ++i) sums[i] += values[i * a.row_stride] * factor;
      }
      T* at = to + begin * out.row_stride;
      for (int64_t i = 0; i < many; ++i) {
        at[i * out.row_stride] = out.add ? at[i * out.row_stride] + sums[i] : sums[i];
      }
    }
  }
}

// kRows x kClasses outputs of `matmul_dots`, in registers.
template <typename T, int64_t kRows, int64_t kClasses>
DGL_EXT_INLINE void dot_tile(int64_t width, const T* const* x, const T* const* w, T* const* out) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const int64_t whole = width / kLanes * kLanes;
  Vector sums[kRows][kClasses] = {};
  for (int64_t k = 0; k < whole; k += kLanes) {
    Vector w_parts[kClasses];
#pragma GCC unroll 8
    for (int64_t c = 0; c < kClasses; ++c) load(w_parts[c], w[c] + k);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      Vector x_part;
      load(x_part, x[r] + k);
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
DGL_EXT_INLINE void dots_body(int64_t row_begin, int64_t row_end, int64_t classes, int64_t width,
                              const Strided<T>& x, const Strided<T>& w, T* out) {
  constexpr int64_t kRows = 4;
  constexpr int64_t kClasses = 3;
  constexpr int64_t kCached = 8;  // rows of x that stay in cache while w passes by once
  if (classes <= kThin && width <= kThin) {
    thin<T>(row_end - row_begin, classes, width, {x.row(row_begin), x.row_stride, 1},
            {w.data, 1, w.row_stride}, {out + row_begin * classes, classes});
    return;
  }
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

// kRows rows of a times a packed panel of kVectors vectors of columns, in registers.
template <typename T, int kBytes, int64_t kRows, int64_t kVectors>
DGL_EXT_INLINE void tile(int64_t count, const Strided<T>& a, const T* b, int64_t b_stride,
                         int64_t cols, const MatmulOutput<T>& out) {
  using Vector = typename Lanes<T, kBytes>::Vector;
  constexpr int64_t kLanes = Lanes<T, kBytes>::kCount;
  if (out.col_stride == 1) {  // the outputs' lines are on their way while the sums are computed
#pragma GCC unroll 6
    for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int64_t v = 0; v < kVectors; ++v) {
        __builtin_prefetch(out.data + i * out.row_stride + v * kLanes, /*rw=*/1);
      }
    }
  }
  Vector sums[kRows][kVectors] = {};
  const T* a_part = a.data;
  for (int64_t j = 0; j < count; ++j, a_part += a.col_stride, b += b_stride) {
    Vector parts[kVectors];
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v) load(parts[v], b + v * kLanes);
#pragma GCC unroll 6
    for (int64_t i = 0; i < kRows; ++i) {
      const T factor = a_part[i * a.row_stride];
#pragma GCC unroll 2
      for (int64_t v = 0; v < kVectors; ++v) sums[i][v] += factor * parts[v];
    }
  }
  if (out.col_stride == 1 && cols == kVectors * kLanes) {
#pragma GCC unroll 6
    for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int64_t v = 0; v < kVectors; ++v) {
        T* at = out.data + i * out.row_stride + v * kLanes;
        if (out.add) {
          Vector before;
          load(before, at);
          sums[i][v] += before;
        }
        store(at, sums[i][v]);
      }
    }
    return;
  }
  T values[kRows][kVectors * kLanes];
#pragma GCC unroll 6
  for (int64_t i = 0; i < kRows; ++i) std::memcpy(values[i], sums[i], sizeof(sums[i]));
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t i = 0; i < kRows; ++i) {
      T& at = out.data[i * out.row_stride + c * out.col_stride];
      at = out.add ? at + values[i][c] : values[i][c];
    }
  }
}

// The tile of as many rows, up to kMost.
template <typename T, int kBytes, int64_t kMost, int64_t kVectors>
DGL_EXT_INLINE void tile_of(int64_t rows, int64_t count, const Strided<T>& a, const T* b,
                            int64_t b_stride, int64_t cols, const MatmulOutput<T>& out) {
  if constexpr (kMost > 1) {
    if (rows < kMost) {
      return tile_of<T, kBytes, kMost - 1, kVectors>(rows, count, a, b, b_stride, cols, out);
    }
  }
  tile<T, kBytes, kMost, kVectors>(count, a, b, b_stride, cols, out);
}

// All rows of a times one panel. Blocks of 6 rows are what 16 registers hold; rows are spread over
// blocks evenly, since a block of one or two waits for its own sums.
template <typename T, int kBytes, int64_t kVectors>
DGL_EXT_INLINE void panel(int64_t rows, int64_t count, const Strided<T>& a, const T* b,
                          int64_t b_stride, int64_t cols, const MatmulOutput<T>& out) {
  constexpr int64_t kMostRows = 6;
  const int64_t blocks = (rows + kMostRows - 1) / kMostRows;
  for (int64_t block = 0, row = 0; block < blocks; ++block) {
    const int64_t end = rows * (block + 1) / blocks;
    const Strided<T> part{a.row(row), a.row_stride, a.col_stride};
    MatmulOutput<T> at = out;
    at.data += row * out.row_stride;
    tile_of<T, kBytes, kMostRows, kVectors>(end - row, count, part, b, b_stride, cols, at);
    row = end;
  }
}

// Columns of b side by side, zeros behind the last of them. kWidth columns is the usual case, whose
// copies are of a size that the compiler knows.
template <typename T, int64_t kWidth>
DGL_EXT_INLINE void pack(int64_t count, int64_t cols, const Strided<T>& b, T* packed) {
  if (cols == kWidth && b.col_stride == 1) {
    for (int64_t j = 0; j < count; ++j) {
      std::memcpy(packed + j * kWidth, b.row(j), kWidth * sizeof(T));
    }
    return;
  }
  constexpr int64_t kLine = 16;  // of b, if its columns are contiguous: whole cache lines
  for (int64_t begin = 0; begin < count; begin += kLine) {
    const int64_t end = std::min(count, begin + kLine);
    for (int64_t c = 0; c < kWidth; ++c) {
      const T* from = b.data + c * b.col_stride;
      for (int64_t j = begin; j < end; ++j) {
        packed[j * kWidth + c] = c < cols ? from[j * b.row_stride] : T(0);
      }
    }
  }
}

// out[i, k] = sum_j a[i, j] b[j, k] for ranges of rows and columns; any strides.
template <typename T, int kBytes>
DGL_EXT_INLINE void product_body(int64_t row_begin, int64_t row_end, int64_t col_begin,
                                 int64_t col_end, int64_t count, const Strided<T>& a,
                                 const Strided<T>& b, const MatmulOutput<T>& out) {
  constexpr int64_t kLanes = Lanes<T, kBytes>::kCount;
  constexpr int64_t kWidth = 2 * kLanes;
  constexpr int64_t kBlock = 256;  // inputs: a panel of them stays in cache
  // Where few rows or few inputs read a panel, packing it costs more than rows of b that lie a
  // power of two apart and so fall on one another in the cache.
  constexpr int64_t kFewRows = 12;
  constexpr int64_t kFewInputs = 8;
  const int64_t rows = row_end - row_begin;
  if (col_end - col_begin <= kThin && (count <= kThinInputs || rows <= kThin)) {
    MatmulOutput<T> at = out;
    at.data += row_begin * out.row_stride + col_begin * out.col_stride;
    const Strided<T> from{b.data + col_begin * b.col_stride, b.row_stride, b.col_stride};
    thin<T>(rows, col_end - col_begin, count, {a.row(row_begin), a.row_stride, a.col_stride}, from,
            at);
    return;
  }
  alignas(64) T packed[kBlock * kWidth];
  const bool direct = b.col_stride == 1 && (rows <= kFewRows || count <= kFewInputs);
  int64_t j = 0;
  do {  // once if there are no inputs: a sum of none is zero
    const int64_t inputs = std::min(kBlock, count - j);
    const Strided<T> part{a.row(row_begin) + j * a.col_stride, a.row_stride, a.col_stride};
    for (int64_t begin = col_begin; begin < col_end; begin += kWidth) {
      const int64_t cols = std::min(kWidth, col_end - begin);
      Strided<T> from{b.row(j) + begin * b.col_stride, b.row_stride, b.col_stride};
      if (!direct || cols < kWidth) {
        pack<T, kWidth>(inputs, cols, from, packed);
        from = {packed, kWidth, 1};
      }
      const MatmulOutput<T> to{out.data + row_begin * out.row_stride + begin * out.col_stride,
                               out.row_stride, out.col_stride, out.add || j > 0};
      if (cols > kLanes) {
        panel<T, kBytes, 2>(rows, inputs, part, from.data, from.row_stride, cols, to);
      } else {
        panel<T, kBytes, 1>(rows, inputs, part, from.data, from.row_stride, cols, to);
      }
    }
    j += inputs;
  } while (j < count);
}

// Wider vectors gain nothing in `matmul_dots`, where the sums over lanes cost more.
template <typename T>
auto dots_for(Isa isa) {
  return isa == Isa::kPortable ? dots_body<T> : Compiled<dots_body<T>>::avx2;
}

template <typename T>
auto product_for(Isa isa) {
  if (isa == Isa::kAvx512) return Compiled<product_body<T, 64>>::avx512;
  return isa == Isa::kAvx2 ? Compiled<product_body<T, 32>>::avx2 : product_body<T, 32>;
}

}  // namespace matmul_bodies

// out[i, k] = sum_j a[i, j] b[j, k] for ranges of rows and columns; any strides.
template <typename T>
void matmul_packed(int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                   int64_t count, const Strided<T>& a, const Strided<T>& b,
                   const MatmulOutput<T>& out) {
  matmul_bodies::product_for<T>(isa())(row_begin, row_end, col_begin, col_end, count, a, b, out);
}

// The widest rows for `matmul_dots`, which have one running total per lane.
constexpr int64_t kLongestDots = 1024;

// out[r, c] = sum_k x[r, k] w[c, k] for a range of rows. The rows of x and w are contiguous, out is
// row-major with `classes` columns. Faster than `matmul_packed` for few classes or few rows.
template <typename T>
void matmul_dots(int64_t row_begin, int64_t row_end, int64_t classes, int64_t width,
                 const Strided<T>& x, const Strided<T>& w, T* out) {
  matmul_bodies::dots_for<T>(isa())(row_begin, row_end, classes, width, x, w, out);
}

}  // namespace dgl_ext
