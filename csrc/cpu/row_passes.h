// What is left of a head on the CPU when its products are taken: passes over rows that add biases,
// sum modalities and mix gradients. Free of torch, so that the C++ tests can drive them with numpy;
// each works on a range of rows or columns, which the caller spreads over threads. Results do not
// depend on how the range is cut.
//
// The loops carry `ivdep`: an output may be the very buffer of an input, element for element, which
// is no hazard but would keep the compiler from vectorising.

#pragma once

#include <algorithm>
#include <cstdint>

// Before a loop whose rounds do not depend on one another, though pointers might.
#if defined(__clang__)
#define DGL_EXT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define DGL_EXT_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace dgl_ext {

template <typename T>
struct Strided {
  const T* data;
  int64_t row_stride;
  int64_t col_stride;

  const T* row(int64_t r) const { return data + r * row_stride; }
};

// One modality of a linear head: logits[r, c] = partial[r, c] + bias[c].
template <typename T>
struct LogitsBranch {
  Strided<T> partial;
  const T* bias;
  T* logits;  // row-major
};

// A gradient and the share of it that counts.
template <typename T>
struct Term {
  Strided<T> values;
  T scale;
};

// out[r, c] = in[r, c] + bias[c]; out is row-major.
template <typename T>
void add_bias(int64_t row_begin, int64_t row_end, int64_t columns, const Strided<T>& in,
              const T* bias, T* out) {
  if (columns == 1) {  // here and below: rows of one column are a loop of their own
    for (int64_t r = row_begin; r < row_end; ++r) out[r] = *in.row(r) + *bias;
    return;
  }
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* in_row = in.row(r);
    T* out_row = out + r * columns;
    if (in.col_stride == 1) {
      DGL_EXT_INDEPENDENT
      for (int64_t c = 0; c < columns; ++c) out_row[c] = in_row[c] + bias[c];
    } else {
      for (int64_t c = 0; c < columns; ++c) out_row[c] = in_row[c * in.col_stride] + bias[c];
    }
  }
}

// fused[r, c] = fused_bias[c] + sum_i partial_i[r, c], and every branch's own logits.
template <typename T>
void combine_logits(int64_t row_begin, int64_t row_end, int64_t columns,
                    const LogitsBranch<T>* branches, int64_t count, const T* fused_bias, T* fused) {
  if (columns == 1) {
    std::fill(fused + row_begin, fused + row_end, *fused_bias);
    for (int64_t i = 0; i < count; ++i) {
      const Strided<T>& partial = branches[i].partial;
      T* logits = branches[i].logits;
      const T bias = *branches[i].bias;
      for (int64_t r = row_begin; r < row_end; ++r) {
        const T value = *partial.row(r);
        fused[r] += value;
        logits[r] = value + bias;
      }
    }
    return;
  }
  for (int64_t r = row_begin; r < row_end; ++r) {
    T* fused_row = fused + r * columns;
    std::copy(fused_bias, fused_bias + columns, fused_row);
    for (int64_t i = 0; i < count; ++i) {
      const LogitsBranch<T>& branch = branches[i];
      const int64_t stride = branch.partial.col_stride;
      const T* partial = branch.partial.row(r);
      const T* bias = branch.bias;
      T* logits = branch.logits + r * columns;
      if (stride == 1) {
        DGL_EXT_INDEPENDENT
        for (int64_t c = 0; c < columns; ++c) {
          const T value = partial[c];
          fused_row[c] += value;
          logits[c] = value + bias[c];
        }
      } else {
        for (int64_t c = 0; c < columns; ++c) {
          const T value = partial[c * stride];
          fused_row[c] += value;
          logits[c] = value + bias[c];
        }
      }
    }
  }
}

// out[r, c] = sum_k scale_k values_k[r, c], zero if there are no terms; out is row-major.
template <typename T>
void mix(int64_t row_begin, int64_t row_end, int64_t columns, const Term<T>* terms, int64_t count,
         T* out) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    T* out_row = out + r * columns;
    std::fill(out_row, out_row + columns, T(0));
    for (int64_t k = 0; k < count; ++k) {
      const T* row = terms[k].values.row(r);
      const int64_t stride = terms[k].values.col_stride;
      const T scale = terms[k].scale;
      for (int64_t c = 0; c < columns; ++c) out_row[c] += scale * row[c * stride];
    }
  }
}

// totals[c] += sum_k scale_k sum_r values_k[r, c], for a range of columns. In double: rows may be
// many, and a bias gradient is a sum over all of them.
template <typename T>
void add_column_sums(int64_t col_begin, int64_t col_end, int64_t rows, const Term<T>* terms,
                     int64_t count, double* totals) {
  constexpr int64_t kBlock = 64;  // columns whose sums stay in cache
  // Rows in turn, since each sum waits for the one before: of few columns there is little else.
  constexpr int64_t kChains = 4;
  for (int64_t begin = col_begin; begin < col_end; begin += kBlock) {
    const int64_t width = std::min(kBlock, col_end - begin);
    for (int64_t k = 0; k < count; ++k) {
      const Strided<T>& values = terms[k].values;
      double sums[kChains][kBlock] = {};
      for (int64_t r = 0; r < rows; ++r) {
        const T* row = values.row(r) + begin * values.col_stride;
        double* sum = sums[r % kChains];
        if (values.col_stride == 1) {
          for (int64_t c = 0; c < width; ++c) sum[c] += row[c];
        } else {
          for (int64_t c = 0; c < width; ++c) sum[c] += row[c * values.col_stride];
        }
      }
      const double scale = terms[k].scale;
      for (int64_t c = 0; c < width; ++c) {
        totals[begin + c] += scale * ((sums[0][c] + sums[2][c]) + (sums[1][c] + sums[3][c]));
      }
    }
  }
}

// FiLM's hidden rows: h = gamma y + beta for the fused branch, beta for x alone (y = 0) and
// b_gamma y + b_beta for y alone (x = 0). A null output is not wanted. All outputs are row-major.
template <typename T>
struct FilmHidden {
  T* fused;
  T* of_x;
  T* of_y;
};

// `film` is [gamma | beta], row-major with 2 H columns; `bias` is [b_gamma | b_beta].
template <typename T>
void film_hidden(int64_t row_begin, int64_t row_end, int64_t hidden, const T* film,
                 const Strided<T>& y, const T* bias, const FilmHidden<T>& out) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* gamma = film + r * 2 * hidden;
    const T* beta = gamma + hidden;
    const T* y_row = y.row(r);
    const int64_t stride = y.col_stride;
    if (out.fused != nullptr) {
      T* out_row = out.fused + r * hidden;
      for (int64_t c = 0; c < hidden; ++c) out_row[c] = gamma[c] * y_row[c * stride] + beta[c];
    }
    if (out.of_x != nullptr) std::copy(beta, beta + hidden, out.of_x + r * hidden);
    if (out.of_y != nullptr) {
      T* out_row = out.of_y + r * hidden;
      for (int64_t c = 0; c < hidden; ++c) {
        out_row[c] = bias[c] * y_row[c * stride] + bias[hidden + c];
      }
    }
  }
}

// The gradient of [gamma | beta]: out[r] = [s d y | s d + s_x d_x], where d is the gradient of
// gamma y + beta and d_x that of beta alone. A null d or d_x counts as zero.
template <typename T>
void film_grad(int64_t row_begin, int64_t row_end, int64_t hidden, const T* d, T scale,
               const T* d_x, T scale_x, const Strided<T>& y, T* out) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    T* grad_gamma = out + r * 2 * hidden;
    T* grad_beta = grad_gamma + hidden;
    const T* y_row = y.row(r);
    if (d != nullptr) {
      const T* d_row = d + r * hidden;
      for (int64_t c = 0; c < hidden; ++c) {
        grad_gamma[c] = scale * d_row[c] * y_row[c * y.col_stride];
        grad_beta[c] = scale * d_row[c];
      }
    } else {
      std::fill(grad_gamma, grad_gamma + 2 * hidden, T(0));
    }
    if (d_x != nullptr) {
      const T* d_row = d_x + r * hidden;
      for (int64_t c = 0; c < hidden; ++c) grad_beta[c] += scale_x * d_row[c];
    }
  }
}

// The gradient of y: out[r] = s gamma d + b_gamma d_y. A null d or d_y counts as zero.
template <typename T>
void film_grad_target(int64_t row_begin, int64_t row_end, int64_t hidden, const T* d, T scale,
                      const T* film, const T* d_y, const T* bias, T* out) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    T* out_row = out + r * hidden;
    const T* gamma = film + r * 2 * hidden;
    for (int64_t c = 0; c < hidden; ++c) {
      const T fused = d != nullptr ? scale * gamma[c] * d[r * hidden + c] : T(0);
      const T alone = d_y != nullptr ? bias[c] * d_y[r * hidden + c] : T(0);
      out_row[c] = fused + alone;
    }
  }
}

}  // namespace dgl_ext
