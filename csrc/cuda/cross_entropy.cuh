// The losses of a training step, for any head: which rows count, softmax and residuals by rows,
// sums.
//
// Lane k of a warp keeps what there is to know of branch k (0 fused): arrays over branches would
// not stay in registers.
#pragma once

#include "phases.cuh"

namespace dgl_ext {

/// What the phases below need of a step's arguments; `present` has a mask per unimodal branch.
struct StepContext {
  const CrossEntropy& loss;
  const StepPlan& plan;
  const uint8_t* const* present;
  int64_t rows, classes;
  void* workspace;
};

template <class C>
struct StepLosses {
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;

  /// Counts the rows of this CTA's share, before anything else is known of them. The first grid
  /// sync of the launch must follow.
  static __device__ __forceinline__ void count(const StepContext& step, T* shared) {
    const int lane = threadIdx.x % 32;
    int64_t mine = 0;
#pragma unroll 1
    for (int64_t first = int64_t(blockIdx.x) * C::kThreads + threadIdx.x / 32 * 32;
         first < step.rows; first += int64_t(gridDim.x) * C::kThreads) {
      const int64_t row = first + lane;
      bool counts = false;
      if (row < step.rows) {
        const int64_t target = step.loss.target[row];
        counts = target != step.loss.ignore_index;
        require(!counts || (target >= 0 && target < step.classes), "target in [0, classes)");
      }
#pragma unroll 1
      for (int k = 0; k < step.plan.branches; ++k) {
        const int here = warp_count(counts && (k == 0 || !is_absent(step.present[k - 1], row)));
        if (lane == k) mine += here;
      }
    }
    auto* of_warp = reinterpret_cast<int64_t*>(shared);
    of_warp[threadIdx.x] = mine;
    __syncthreads();
    if (int(threadIdx.x) < step.plan.branches) {
#pragma unroll 1
      for (int w = 1; w < C::kWarps; ++w) mine += of_warp[w * 32 + threadIdx.x];
      counts(step)[blockIdx.x * step.plan.branches + threadIdx.x] = mine;
    }
    __syncthreads();  // shared memory is free again
  }

  /// Losses, hits and residual planes of a chunk of rows. logit(k, row, column) is a logit of
  /// branch k; `row` counts from the first of the chunk. Where planes mix branches, a warp takes a
  /// whole row, else one branch of it. A grid sync must follow.
  template <class Logit>
  static __device__ __forceinline__ void run_rows(const StepContext& step, T* shared, RowRange rows,
                                                  Logit&& logit) {
    const StepPlan& plan = step.plan;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t first_item = int64_t(blockIdx.x) * C::kWarps + warp;
    Accumulator weight = 1;  // of branch `lane` in the planes
    const bool writes_totals = rows.begin == 0 && first_item == 0;
    if (plan.mixed || writes_totals) {
      const Accumulator found = find_totals(step, writes_totals);
      if (plan.mixed) weight = found;
    }
    // what a perfect prediction would be: one-hot, or smoothed
    const double smoothing = step.loss.label_smoothing;
    const Accumulator rest = smoothing / double(step.classes);
    const Accumulator at_target = 1 - smoothing + smoothing / double(step.classes);
    double loss_sum = 0;
    int64_t hits = 0;
    const int groups = plan.mixed ? 1 : plan.branches;
#pragma unroll 1
    for (int64_t item = first_item; item < rows.count * groups;
         item += int64_t(gridDim.x) * C::kWarps) {
      const int64_t row = item / groups;
      const int first = plan.mixed ? 0 : int(item % groups);
      const int last = plan.mixed ? plan.branches : first + 1;
      const int64_t target = step.loss.target[rows.begin + row];
      Accumulator largest = 0, inverse_sum = 0;  // of branch `lane`
      uint32_t counting = 0;                     // a bit per branch
#pragma unroll 1
      for (int k = first; k < last; ++k) {
        if (target == step.loss.ignore_index) break;
        if (k > 0 && is_absent(step.present[k - 1], rows.begin + row)) continue;
        counting |= 1u << k;
        const auto z = [&](int64_t column) { return logit(k, row, column); };
        const Branch branch = softmax(step, target, z);
        if (lane == k) {
          largest = branch.largest;
          inverse_sum = Accumulator(1) / branch.sum;
          loss_sum += branch.loss;
          hits += branch.hit;
        }
      }
#pragma unroll 1
      for (int i = 0; i < plan.plane_count; ++i) {
        const StepPlane& plane = plan.planes[i];
        if (plane.first < first || plane.first >= last) continue;
        T* to = workspace_at<T>(step.workspace, plan.plane_offset) +
                (i * rows.count + row) * plan.padded_classes;
#pragma unroll 1
        for (int64_t begin = 0; begin < step.classes; begin += 32) {
          const int64_t column = begin + lane;
          const auto term = [&](int k) {
            // all lanes are here: those beyond the last column take part in the shuffles
            const Accumulator max = warp_broadcast(largest, k);
            const Accumulator inverse = warp_broadcast(inverse_sum, k);
            const Accumulator factor = warp_broadcast(weight, k);
            if (!(counting >> k & 1) || column >= step.classes) return Accumulator(0);
            const Accumulator p = exponential(logit(k, row, column) - max) * inverse;
            return factor * (p - (column == target ? at_target : rest));
          };
          Accumulator v = term(plane.first);
#pragma unroll 1
          for (int k = plane.begin; k < plane.end; ++k) v += Accumulator(plane.leak) * term(k);
          if (column < step.classes) to[column] = narrow<T>(v);
        }
      }
    }
    add_to_sums(step, shared, rows, loss_sum, hits);
  }

  /// One CTA sums what all have found; total, losses and hits are written.
  static __device__ __forceinline__ void finish(const StepContext& step, T* shared) {
    const StepPlan& plan = step.plan;
    auto* losses = reinterpret_cast<double*>(shared);
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int k = threadIdx.x / 32; k < plan.branches; k += C::kWarps) {
      double loss = 0;
      int64_t correct = 0;
#pragma unroll 1
      for (int64_t cta = lane; cta < gridDim.x; cta += 32) {
        const StepSums& sums = step_sums(step)[cta * plan.branches + k];
        loss += sums.loss;
        correct += sums.correct;
      }
      loss = sum_lanes(loss);
      correct = sum_lanes(correct);
      const int64_t counted = totals(step)[k].counted, all = totals(step)[0].counted;
      if (step.loss.mean) loss = counted == 0 && all > 0 ? 0 : loss / double(counted);
      if (lane == 0) {
        losses[k] = loss;
        static_cast<Accumulator*>(step.loss.losses)[k] = Accumulator(loss);
        step.loss.correct[k] = correct;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      double total = losses[0];
#pragma unroll 1
      for (int k = 1; k < plan.branches; ++k) total += step.loss.alpha[k - 1] * losses[k];
      *static_cast<Accumulator*>(step.loss.total) = Accumulator(total);
    }
    __syncthreads();  // shared memory is free again
  }

 private:
  struct Branch {
    Accumulator largest, sum;  // of the logits; of exp(logit - largest)
    double loss;
    bool hit;
  };

  static __device__ __forceinline__ int64_t* counts(const StepContext& step) {
    return workspace_at<int64_t>(step.workspace, step.plan.counts_offset);
  }
  static __device__ __forceinline__ StepSums* step_sums(const StepContext& step) {
    return workspace_at<StepSums>(step.workspace, step.plan.losses_offset);
  }
  static __device__ __forceinline__ StepTotals* totals(const StepContext& step) {
    return workspace_at<StepTotals>(step.workspace, step.plan.totals_offset);
  }

  /// The sum over the lanes of a warp, in all of them.
  template <class V>
  static __device__ __forceinline__ V sum_lanes(V v) {
#pragma unroll 1
    for (int mask = 16; mask > 0; mask /= 2) v += warp_exchange(v, mask);
    return v;
  }

  /// Softmax and loss of one row of one branch, by one warp. As in PyTorch a row with +inf or with
  /// nothing but -inf has no finite loss.
  template <class Z>
  static __device__ __forceinline__ Branch softmax(const StepContext& step, int64_t target, Z&& z) {
    const bool smooth = step.loss.label_smoothing != 0;
    const Accumulator at_target = z(target);
    Accumulator largest = lowest(), sum = 0;
    double plain_sum = 0;
    bool beaten = false;
#pragma unroll 1
    for (int64_t c = threadIdx.x % 32; c < step.classes; c += 32) {
      const Accumulator v = z(c);
      if (v > largest) {
        sum = sum * exponential(largest - v) + 1;
        largest = v;
      } else {
        sum += exponential(v - largest);
      }
      if (smooth) plain_sum += v;
      beaten |= beats(v, at_target) || (c < target && !beats(at_target, v));
    }
#pragma unroll 1
    for (int mask = 16; mask > 0; mask /= 2) {
      const Accumulator other_largest = warp_exchange(largest, mask);
      const Accumulator other_sum = warp_exchange(sum, mask);
      const Accumulator both = largest > other_largest ? largest : other_largest;
      sum = sum * exponential(largest - both) + other_sum * exponential(other_largest - both);
      largest = both;
    }
    const Accumulator log_sum = logarithm(sum);
    Branch branch{largest, sum, log_sum - (at_target - largest), warp_count(beaten) == 0};
    if (smooth) {
      const double smoothing = step.loss.label_smoothing;
      const double uniform =
          log_sum + (double(largest) - sum_lanes(plain_sum) / double(step.classes));
      branch.loss = (1 - smoothing) * branch.loss + smoothing * uniform;
    }
    return branch;
  }

  /// Whether a wins over b wherever the two stand: NaN counts as the largest.
  static __device__ __forceinline__ bool beats(Accumulator a, Accumulator b) {
    return a > b || (a != a && b == b);
  }
  /// Finite, so that -inf minus it is no NaN.
  static __device__ __forceinline__ Accumulator lowest() {
    if constexpr (sizeof(Accumulator) == 8) return -1.7976931348623157e308;
    return -3.402823466e38f;
  }

  /// From all CTAs' counts: lane k learns the weight of branch k in planes that mix branches, and
  /// one warp of the launch writes the totals.
  static __device__ __forceinline__ Accumulator find_totals(const StepContext& step, bool write) {
    const int lane = threadIdx.x % 32;
    const int branches = step.plan.branches;
    int64_t counted = 0;
#pragma unroll 1
    for (int k = 0; k < branches; ++k) {
      int64_t sum = 0;
#pragma unroll 1
      for (int64_t cta = lane; cta < gridDim.x; cta += 32) sum += counts(step)[cta * branches + k];
      sum = sum_lanes(sum);
      if (lane == k) counted = sum;
    }
    const int64_t all = warp_broadcast(counted, 0);
    if (lane >= branches) return 0;
    const bool mean = step.loss.mean;
    const double alpha = lane == 0 ? 1 : step.loss.alpha[lane - 1];
    if (write) {
      const double scale = !mean ? alpha : counted > 0 ? alpha / double(counted) : 0;
      totals(step)[lane] = {counted, scale};
    }
    if (lane == 0 || !mean) return alpha;
    return counted > 0 ? alpha * (double(all) / double(counted)) : 0;
  }

  /// Adds the warps' sums in order to what this CTA has of earlier chunks.
  static __device__ __forceinline__ void add_to_sums(const StepContext& step, T* shared,
                                                     RowRange rows, double loss, int64_t hits) {
    auto* of_warp = reinterpret_cast<StepSums*>(shared);
    of_warp[threadIdx.x] = {loss, hits};
    __syncthreads();
    if (int(threadIdx.x) >= step.plan.branches) return;
    StepSums& kept = step_sums(step)[blockIdx.x * step.plan.branches + threadIdx.x];
#pragma unroll 1
    for (int w = 1; w < C::kWarps; ++w) {
      loss += of_warp[w * 32 + threadIdx.x].loss;
      hits += of_warp[w * 32 + threadIdx.x].correct;
    }
    if (rows.begin > 0) {
      loss += kept.loss;
      hits += kept.correct;
    }
    kept = {loss, hits};
  }
};

}  // namespace dgl_ext
