// The cross-entropy of rows of logits, which become the gradient of the logits in place. Free of
// torch, like row_passes.h.
//
// A row is read three times while it is in cache: for its maximum, for the exponentials and their
// sum, and for the residuals. Sums over classes run in T over short blocks and in double over the
// blocks, so that many classes lose no bits. A row's result depends on nothing but the row.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "cpu/vectors.h"

namespace dgl_ext {

// Soft targets, of any floating dtype and strides.
template <typename T>
struct SoftTarget {
  const void* data = nullptr;
  int64_t row_stride = 0;
  int64_t col_stride = 0;
  // Reads `count` of them from element `first` on.
  void (*read)(const void* data, int64_t first, int64_t stride, int64_t count, T* to) = nullptr;
};

// What the loss of a range of rows depends on besides the logits, and what is left of each row. Row
// pointers start at row 0.
template <typename T>
struct LossRows {
  const int64_t* target;  // null: soft targets
  SoftTarget<T> soft;
  const T* class_weight;   // null: ones
  const T* sample_weight;  // null: ones; of the residuals, not of the losses
  int64_t ignore_index;
  const bool* present;  // null: every row is there
  double label_smoothing;
  double scale;   // of the residuals
  bool residual;  // whether the logits become residuals
  T* losses;
  int64_t* predictions;

  // Whether every class takes part in the target, each with a weight of its own.
  bool is_dense() const { return target == nullptr || (class_weight && label_smoothing != 0); }
};

namespace cross_entropy {

// exp(x) for x <= 0 or NaN, within one ulp where the processor has FMA; 0 where a float32 would be
// subnormal. By reference, since passing vectors by value depends on what the caller is compiled
// for.
DGL_EXT_INLINE void exponential(Lanes<float>::Vector& x) {
  using Vector = Lanes<float>::Vector;
  typedef uint32_t Bits __attribute__((vector_size(32)));
  // x = n log(2) + r. Adding 1.5 * 2^23 rounds to an integer, which the low bits then hold.
  constexpr float kRound = 12582912.0f;
  const Vector rounded = x * 0x1.715476p+0f + kRound;
  const Vector n = rounded - kRound;
  // log(2) in two parts; n times the first is exact.
  const Vector r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  // exp(r) = 1 + r + r^2 q(r), q fitted to the least relative error of exp over |r| <= log(2) / 2
  Vector q = 0x1.6a1a72p-10f * r + 0x1.123fc6p-7f;
  q = q * r + 0x1.555916p-5f;
  q = q * r + 0x1.55548ap-3f;
  q = q * r + 0x1.fffffcp-2f;
  const Vector p = (q * r * r + r) + 1.0f;
  const Vector scaled = (Vector)((Bits)p + ((Bits)rounded << 23));
  const Vector result = x < -87.33f ? Vector{} : scaled;
  x = x == x ? result : x;
}

DGL_EXT_INLINE void exponential(Lanes<double>::Vector& x) {
  for (int64_t lane = 0; lane < Lanes<double>::kCount; ++lane) x[lane] = std::exp(x[lane]);
}

// `count` values, and -inf in the lanes behind them, which no maximum and no sum sees.
template <typename T>
DGL_EXT_INLINE void load_part(typename Lanes<T>::Vector& vector, const T* data, int64_t count) {
  vector = typename Lanes<T>::Vector{} - std::numeric_limits<T>::infinity();
  std::memcpy(&vector, data, count * sizeof(T));
}

// The largest of a vector's lanes, none of them NaN; halves onto halves.
DGL_EXT_INLINE float lane_maximum(const Lanes<float>::Vector& v) {
  Lanes<float>::Vector other = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  const Lanes<float>::Vector halves = v > other ? v : other;
  other = __builtin_shufflevector(halves, halves, 2, 3, 0, 1, 6, 7, 4, 5);
  const Lanes<float>::Vector pairs = halves > other ? halves : other;
  return std::max(pairs[0], pairs[1]);
}
DGL_EXT_INLINE double lane_maximum(const Lanes<double>::Vector& v) {
  return std::max(std::max(v[0], v[2]), std::max(v[1], v[3]));
}

// Whether a comparison holds in some lane.
template <typename Comparison>
DGL_EXT_INLINE bool any_lane(const Comparison& comparison) {
  uint64_t bits[4];
  static_assert(sizeof(bits) == sizeof(comparison));
  std::memcpy(bits, &comparison, sizeof(bits));
  return (bits[0] | bits[1] | bits[2] | bits[3]) != 0;
}

// The sum over a vector's lanes, in double.
DGL_EXT_INLINE double wide_sum(const Lanes<float>::Vector& v) {
  double sums[4];
  for (int64_t k = 0; k < 4; ++k)
    sums[k] = static_cast<double>(v[k]) + static_cast<double>(v[k + 4]);
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}
DGL_EXT_INLINE double wide_sum(const Lanes<double>::Vector& v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}

// The largest value that is not NaN (-inf if there is none), and whether there is a NaN.
template <typename T>
DGL_EXT_INLINE T maximum(const T* row, int64_t classes, bool& has_nan) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  constexpr int64_t kChains = 4;
  Vector most[kChains];
  auto unordered = Vector{} != Vector{};
  for (Vector& chain : most) chain = Vector{} - std::numeric_limits<T>::infinity();
  int64_t c = 0;
  for (; c + kChains * kLanes <= classes; c += kChains * kLanes) {
    for (int64_t k = 0; k < kChains; ++k) {
      Vector values;
      load(values, row + c + k * kLanes);
      most[k] = values > most[k] ? values : most[k];
      unordered |= values != values;
    }
  }
  for (; c < classes; c += kLanes) {
    Vector values;
    load_part<T>(values, row + c, std::min(kLanes, classes - c));
    most[0] = values > most[0] ? values : most[0];
    unordered |= values != values;
  }
  for (int64_t k = 1; k < kChains; ++k) most[0] = most[k] > most[0] ? most[k] : most[0];
  has_nan = any_lane(unordered);
  return lane_maximum(most[0]);
}

// The first of the largest values, as torch.argmax takes it: a NaN is larger than all.
template <typename T>
DGL_EXT_INLINE int64_t first_largest(const T* row, int64_t classes, T most, bool has_nan) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  constexpr int64_t kChains = 4;
  int64_t c = 0;
  for (; c + kChains * kLanes <= classes; c += kChains * kLanes) {
    auto found = Vector{} != Vector{};
    for (int64_t k = 0; k < kChains; ++k) {
      Vector values;
      load(values, row + c + k * kLanes);
      found |= has_nan ? values != values : values == most;
    }
    if (any_lane(found)) break;
  }
  while (c < classes && (has_nan ? row[c] == row[c] : row[c] != most)) ++c;
  return c < classes ? c : 0;
}

// sum_c exp(row[c] - most); the exponentials replace the row where `keep`.
template <typename T>
DGL_EXT_INLINE double exponentials(T* row, int64_t classes, T most, bool keep) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  constexpr int64_t kBlock = 64 * kLanes;
  double sum = 0;
  for (int64_t begin = 0; begin < classes; begin += kBlock) {
    const int64_t end = std::min(classes, begin + kBlock);
    Vector sums{};
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) {
      Vector values;
      load(values, row + c);
      values -= most;
      exponential(values);
      sums += values;
      if (keep) std::memcpy(row + c, &values, sizeof(values));
    }
    if (c < end) {
      Vector values;
      load_part<T>(values, row + c, end - c);
      values -= most;
      exponential(values);
      sums += values;
      if (keep) std::memcpy(row + c, &values, (end - c) * sizeof(T));
    }
    sum += wide_sum(sums);
  }
  return sum;
}

// sum_c (row[c] - most)
template <typename T>
DGL_EXT_INLINE double shifted_sum(const T* row, int64_t classes, T most) {
  constexpr int64_t kChains = 8;
  double sums[kChains] = {};
  int64_t c = 0;
  for (; c + kChains <= classes; c += kChains) {
    for (int64_t k = 0; k < kChains; ++k) sums[k] += row[c + k] - most;
  }
  double sum = 0;
  for (; c < classes; ++c) sum += row[c] - most;
  for (const double chain : sums) sum += chain;
  return sum;
}

// Whether a row counts; one that does not has no loss and no residuals.
template <typename T>
DGL_EXT_INLINE bool counts(const LossRows<T>& rows, int64_t r, int64_t classes, T* row) {
  const bool labelled = rows.target == nullptr || rows.target[r] != rows.ignore_index;
  if (labelled && (rows.present == nullptr || rows.present[r])) return true;
  rows.losses[r] = 0;
  if (rows.residual) std::fill(row, row + classes, T(0));
  return false;
}

// The mean of row - most under the smoothed target, by which log(sum) exceeds the loss.
template <typename T>
DGL_EXT_INLINE double at_target(const LossRows<T>& rows, int64_t r, int64_t classes, const T* row,
                                T most) {
  const double there = static_cast<double>(row[rows.target[r]]) - static_cast<double>(most);
  // A masked class (-inf) must not meet a smoothing of zero.
  if (rows.label_smoothing == 0) return there;
  const double everywhere = shifted_sum<T>(row, classes, most) / classes;
  return (1 - rows.label_smoothing) * there + rows.label_smoothing * everywhere;
}

// What multiplies the residuals of a row, but for its target's class weight.
template <typename T>
DGL_EXT_INLINE double row_scale(const LossRows<T>& rows, int64_t r) {
  return rows.sample_weight ? rows.scale * static_cast<double>(rows.sample_weight[r]) : rows.scale;
}

// The loss and the residuals of a row whose target is dense; `wanted` has room for it. Returns
// whether the prediction is the target's first largest class.
template <typename T>
DGL_EXT_INLINE bool dense_row(const LossRows<T>& rows, int64_t r, int64_t classes, T* row, T most,
                              T* wanted) {
  int64_t label;
  if (rows.target != nullptr) {
    label = rows.target[r];
    std::fill(wanted, wanted + classes, T(0));
    wanted[label] = 1;
  } else {
    rows.soft.read(rows.soft.data, r * rows.soft.row_stride, rows.soft.col_stride, classes, wanted);
    bool has_nan;
    const T largest = maximum<T>(wanted, classes, has_nan);
    label = first_largest<T>(wanted, classes, largest, has_nan);
  }
  const T share = static_cast<T>(1 - rows.label_smoothing);
  const T rest = static_cast<T>(rows.label_smoothing / classes);
  for (int64_t c = 0; c < classes; ++c) wanted[c] = share * wanted[c] + rest;
  if (rows.class_weight != nullptr) {
    for (int64_t c = 0; c < classes; ++c) wanted[c] *= rows.class_weight[c];
  }
  constexpr int64_t kChains = 8;
  double masses[kChains] = {}, means[kChains] = {};
  int64_t c = 0;
  for (; c + kChains <= classes; c += kChains) {
    for (int64_t k = 0; k < kChains; ++k) {
      masses[k] += wanted[c + k];
      means[k] += static_cast<double>(wanted[c + k]) * (row[c + k] - most);
    }
  }
  double mass = 0, mean = 0;
  for (; c < classes; ++c) {
    mass += wanted[c];
    mean += static_cast<double>(wanted[c]) * (row[c] - most);
  }
  for (int64_t k = 0; k < kChains; ++k) {
    mass += masses[k];
    mean += means[k];
  }
  const double sum = exponentials<T>(row, classes, most, rows.residual);
  rows.losses[r] = static_cast<T>(mass * std::log(sum) - mean);
  if (rows.residual) {
    const double scale = row_scale<T>(rows, r);
    const T factor = static_cast<T>(scale * mass / sum), less = static_cast<T>(scale);
    for (c = 0; c < classes; ++c) row[c] = row[c] * factor - less * wanted[c];
  }
  return rows.predictions[r] == label;
}

// Of a class index: its weight.
template <typename T>
DGL_EXT_INLINE double target_weight(const LossRows<T>& rows, int64_t r) {
  return rows.class_weight ? static_cast<double>(rows.class_weight[rows.target[r]]) : 1;
}

// The exponentials become residuals: times `factor`, less a part everywhere and one at the target.
template <typename T>
struct Residual {
  T factor, less, at_target;

  DGL_EXT_INLINE Residual(const LossRows<T>& rows, double scale, double sum, int64_t classes)
      : factor(static_cast<T>(scale / sum)),
        less(static_cast<T>(scale * rows.label_smoothing / classes)),
        at_target(static_cast<T>(scale * (1 - rows.label_smoothing))) {}
};

// As many rows side by side as a vector has lanes, where a row would leave its lanes empty.
constexpr int64_t kFewClasses = 8;
template <typename T>
DGL_EXT_INLINE int64_t short_rows(int64_t row_begin, int64_t row_end, int64_t classes,
                                  const LossRows<T>& rows, T* logits) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  int64_t correct = 0;
  for (int64_t first = row_begin; first < row_end; first += kLanes) {
    const int64_t count = std::min(kLanes, row_end - first);
    T* group = logits + first * classes;
    Vector values[kFewClasses] = {};
    Vector most = Vector{} - std::numeric_limits<T>::infinity();
    auto unordered = Vector{} != Vector{};
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t i = 0; i < count; ++i) values[c][i] = group[i * classes + c];
      most = values[c] > most ? values[c] : most;
      unordered |= values[c] != values[c];
    }
    double sums[kLanes] = {};
    for (int64_t c = 0; c < classes; ++c) {
      values[c] -= most;
      exponential(values[c]);
      for (int64_t i = 0; i < kLanes; ++i) sums[i] += values[c][i];
    }
    for (int64_t i = 0; i < count; ++i) {
      T* row = group + i * classes;
      const int64_t r = first + i;
      rows.predictions[r] = first_largest<T>(row, classes, most[i], unordered[i]);
      if (!counts<T>(rows, r, classes, row)) continue;
      correct += rows.predictions[r] == rows.target[r];
      const double weight = target_weight<T>(rows, r);
      const double loss = std::log(sums[i]) - at_target<T>(rows, r, classes, row, most[i]);
      rows.losses[r] = static_cast<T>(weight * loss);
      if (!rows.residual) continue;
      const Residual<T> residual(rows, weight * row_scale<T>(rows, r), sums[i], classes);
      for (int64_t c = 0; c < classes; ++c) {
        row[c] = values[c][i] * residual.factor - residual.less;
      }
      row[rows.target[r]] -= residual.at_target;
    }
  }
  return correct;
}

// Returns how many of the rows that count have their target on top.
template <typename T>
DGL_EXT_INLINE int64_t rows(int64_t row_begin, int64_t row_end, int64_t classes,
                            const LossRows<T>& rows, T* logits) {
  using Vector = typename Lanes<T>::Vector;
  constexpr int64_t kLanes = Lanes<T>::kCount;
  const bool dense = rows.is_dense();
  if (classes <= kFewClasses && !dense) {
    return short_rows<T>(row_begin, row_end, classes, rows, logits);
  }
  const std::unique_ptr<T[]> wanted(dense ? new T[classes] : nullptr);
  int64_t correct = 0;
  for (int64_t r = row_begin; r < row_end; ++r) {
    T* row = logits + r * classes;
    bool has_nan;
    const T most = maximum<T>(row, classes, has_nan);
    rows.predictions[r] = first_largest<T>(row, classes, most, has_nan);
    if (!counts<T>(rows, r, classes, row)) continue;
    if (dense) {
      correct += dense_row<T>(rows, r, classes, row, most, wanted.get());
      continue;
    }
    correct += rows.predictions[r] == rows.target[r];
    const double weight = target_weight<T>(rows, r);
    const double mean = at_target<T>(rows, r, classes, row, most);
    const double sum = exponentials<T>(row, classes, most, rows.residual);
    rows.losses[r] = static_cast<T>(weight * (std::log(sum) - mean));
    if (!rows.residual) continue;
    const Residual<T> residual(rows, weight * row_scale<T>(rows, r), sum, classes);
    int64_t c = 0;
    for (; c + kLanes <= classes; c += kLanes) {
      Vector values;
      load(values, row + c);
      values = values * residual.factor - residual.less;
      std::memcpy(row + c, &values, sizeof(values));
    }
    for (; c < classes; ++c) row[c] = row[c] * residual.factor - residual.less;
    row[rows.target[r]] -= residual.at_target;
  }
  return correct;
}

// Wider vectors than these would be half empty in the rows of few classes.
template <typename T>
auto rows_for(Isa isa) {
  return isa == Isa::kPortable ? rows<T> : Compiled<rows<T>>::avx2;
}

}  // namespace cross_entropy

// The losses of a range of rows of row-major logits, and the logits' residuals in their place:
// scale * weights * (softmax - smoothed target), zero in rows that do not count. Returns how many
// of the rows that count have their target on top. Targets that count must be in [0, classes).
template <typename T>
int64_t cross_entropy_rows(int64_t row_begin, int64_t row_end, int64_t classes,
                           const LossRows<T>& loss, T* logits) {
  return cross_entropy::rows_for<T>(isa())(row_begin, row_end, classes, loss, logits);
}

}  // namespace dgl_ext
