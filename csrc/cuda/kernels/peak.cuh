// Maximum, softmax sum and prediction of some columns of a row, and how two of them make one.
#pragma once

#include "cuda/kernels/intrinsics.cuh"

namespace dgl_ext {

/// What a thread, a warp or a CTA knows of its columns of one branch.
template <class Accumulator>
struct Peak {
  static constexpr uint32_t kNone = 0xffffffffu;  ///< no column

  Accumulator largest, sum;  ///< of the logits; of exp(logit - largest)
  uint32_t best;             ///< column of the largest logit, the first of equal ones

  /// Of no columns. The largest is finite, so that -inf minus it is no NaN.
  static __device__ __forceinline__ Peak none() {
    if constexpr (sizeof(Accumulator) == 8) return {-1.7976931348623157e308, 0, kNone};
    return {Accumulator(-3.402823466e38f), 0, kNone};
  }
  /// Whether a wins over b wherever the two stand: NaN counts as the largest.
  static __device__ __forceinline__ bool beats(Accumulator a, Accumulator b) {
    return a > b || (a != a && b == b);
  }
  __device__ __forceinline__ bool loses_to(Accumulator other, uint32_t column) const {
    return beats(other, largest) || (!beats(largest, other) && column < best);
  }
  /// A value of one more column, which follows those before.
  __device__ __forceinline__ void take(Accumulator value, int64_t column) {
    if (beats(value, largest)) {
      largest = value;
      best = uint32_t(column);
    } else if (best == kNone) {
      best = uint32_t(column);  // -inf may be all there is
    }
  }
  __device__ __forceinline__ void merge(const Peak& other) {
    const Accumulator mine = largest;
    if (loses_to(other.largest, other.best)) {
      largest = other.largest;
      best = other.best;
    }
    sum = sum * exponential(mine - largest) + other.sum * exponential(other.largest - largest);
  }
};

}  // namespace dgl_ext
