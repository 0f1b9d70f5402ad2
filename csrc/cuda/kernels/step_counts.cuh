// Which rows of a step count and with which weights, and what the losses of all rows add up to.
#pragma once

#include "cuda/kernels/step_context.cuh"

namespace dgl_ext {

template <class C>
struct StepCounts {
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;
  static constexpr int kMaxBranches = kMaxModalities + 1;

  /// What a thread adds up over its rows: of branch k, in a thread that is the k-th of its group.
  struct Sums {
    double loss = 0;
    int64_t correct = 0;
  };
  /// What residuals are multiplied by, in shared memory: those of a branch in planes that mix
  /// branches, and those of a row besides its sample weight, so that row weights are 1 on average:
  /// float16 planes hold up to 65,504.
  struct Weights {
    Accumulator branch[kMaxBranches];
    Accumulator row;
    Accumulator target, rest;  ///< of a target's share and of every class, by the smoothing
  };

  /// Counts the rows of this CTA's share, before anything else is known of them: of counting_ctas
  /// CTAs. A grid sync or another launch must follow, or a barrier where one CTA counts all.
  static __device__ __forceinline__ void count(const StepContext& step, T* shared) {
    const int lane = threadIdx.x % 32;
    StepCount mine{0, 0};
#pragma unroll 1
    for (int64_t first = int64_t(blockIdx.x) * C::kThreads + threadIdx.x / 32 * 32;
         first < step.rows; first += int64_t(step.plan.counting_ctas) * C::kThreads) {
      const int64_t row = first + lane;
      bool counts = false;
      double weight = 0;
      if (row < step.rows) {
        const int64_t target = step.loss.target ? step.loss.target[row] : 0;
        counts = !step.loss.target || target != step.loss.ignore_index;
        require(!counts || !step.loss.target || (target >= 0 && target < step.classes),
                "target in [0, classes)");
        if (counts && step.plan.weighted) {
          weight = sample_weight(step, row) * target_weight(step, target);
        }
      }
#pragma unroll 1
      for (int k = 0; k < step.plan.branches; ++k) {
        const bool here = counts && (k == 0 || !is_absent(step.present[k - 1], row));
        const int number = warp_count(here);
        const double divisor = step.plan.weighted ? sum_lanes(here ? weight : 0.) : number;
        if (lane != k) continue;
        mine.rows += number;
        mine.divisor += divisor;
      }
    }
    auto* of_warp = reinterpret_cast<StepCount*>(shared);
    of_warp[threadIdx.x] = mine;
    __syncthreads();
    if (int(threadIdx.x) < step.plan.branches) {
#pragma unroll 1
      for (int w = 1; w < C::kWarps; ++w) add(mine, of_warp[w * 32 + threadIdx.x]);
      counts(step)[blockIdx.x * step.plan.branches + threadIdx.x] = mine;
    }
    __syncthreads();  // shared memory is free again
  }

  /// Finds the weights of the residuals where planes need them; one CTA writes the totals, too.
  static __device__ __forceinline__ void find_weights(const StepContext& step, Weights& weights,
                                                      RowRange rows) {
    if (threadIdx.x == 0) {
      weights.target = 1 - step.loss.label_smoothing;
      weights.rest = step.loss.label_smoothing / double(step.classes);
    }
    if (step.plan.needs_counts || (rows.begin == 0 && blockIdx.x == 0)) {
      find_totals(step, weights, rows);
    } else if (step.plan.mixed && threadIdx.x < 32) {
      set_branch_weight(step, weights, alpha_of(step, threadIdx.x));
    }
    __syncthreads();
  }

  /// Adds the threads' sums in order to what this CTA has of earlier chunks.
  static __device__ __forceinline__ void add_to_sums(const StepContext& step, T* shared,
                                                     RowRange rows, Sums sums) {
    auto* of_thread = reinterpret_cast<StepSums*>(shared);
    of_thread[threadIdx.x] = {sums.loss, sums.correct};
    __syncthreads();
    if (int(threadIdx.x) < step.plan.branches) {
      StepSums& kept = step_sums(step)[blockIdx.x * step.plan.branches + threadIdx.x];
#pragma unroll 1
      for (int w = 1; w < C::kWarps; ++w) {
        sums.loss += of_thread[w * 32 + threadIdx.x].loss;
        sums.correct += of_thread[w * 32 + threadIdx.x].correct;
      }
      if (rows.begin > 0) {
        sums.loss += kept.loss;
        sums.correct += kept.correct;
      }
      kept = {sums.loss, sums.correct};
    }
    __syncthreads();  // shared memory is free again
  }

  /// One CTA sums what all have found; total, losses, counted and correct rows are written.
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
      const StepCount counted = totals(step)[k].count, all = totals(step)[0].count;
      if (step.loss.mean) {
        if (counted.divisor == 0) loss = 0;  // no row has weight: 0, or if none at all has, 0 / 0
        if (all.divisor == 0 || counted.divisor > 0) loss /= counted.divisor;
      }
      if (lane == 0) {
        losses[k] = loss;
        static_cast<Accumulator*>(step.loss.branch_losses)[k] = Accumulator(loss);
        step.loss.correct[k] = correct;
        step.loss.counted[k] = counted.rows;
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

 protected:
  static __device__ __forceinline__ Accumulator sample_weight(const StepContext& step,
                                                              int64_t row) {
    const auto* weights = static_cast<const Accumulator*>(step.loss.sample_weight);
    return weights ? weights[row] : Accumulator(1);
  }
  /// Of a class index; the weights of soft targets are part of those.
  static __device__ __forceinline__ Accumulator target_weight(const StepContext& step,
                                                              int64_t target) {
    const auto* weights = static_cast<const Accumulator*>(step.loss.class_weight);
    return weights && step.loss.target ? weights[target] : Accumulator(1);
  }

 private:
  static __device__ __forceinline__ StepCount* counts(const StepContext& step) {
    return workspace_at<StepCount>(step.workspace, step.plan.counts_offset);
  }
  static __device__ __forceinline__ StepSums* step_sums(const StepContext& step) {
    return workspace_at<StepSums>(step.workspace, step.plan.losses_offset);
  }
  static __device__ __forceinline__ StepTotals* totals(const StepContext& step) {
    return workspace_at<StepTotals>(step.workspace, step.plan.totals_offset);
  }
  static __device__ __forceinline__ void add(StepCount& to, const StepCount& more) {
    to.rows += more.rows;
    to.divisor += more.divisor;
  }
  /// The sum over the lanes of a warp, in all of them.
  template <class V>
  static __device__ __forceinline__ V sum_lanes(V v) {
#pragma unroll 1
    for (int mask = 16; mask > 0; mask /= 2) v += warp_exchange(v, mask);
    return v;
  }
  /// 0 beyond the branches.
  static __device__ __forceinline__ double alpha_of(const StepContext& step, int k) {
    return k == 0 ? 1 : k < step.plan.branches ? step.loss.alpha[k - 1] : 0;
  }

  /// From all CTAs' counts.
  static __device__ __forceinline__ void find_totals(const StepContext& step, Weights& weights,
                                                     RowRange rows) {
    const int lane = threadIdx.x % 32, branches = step.plan.branches;
    if (threadIdx.x < 32) {
      StepCount counted{0, 0}, all{0, 0};
#pragma unroll 1
      for (int k = 0; k < branches; ++k) {
        StepCount sum{0, 0};
#pragma unroll 1
        for (int64_t cta = lane; cta < step.plan.counting_ctas; cta += 32) {
          add(sum, counts(step)[cta * branches + k]);
        }
        sum = {sum_lanes(sum.rows), sum_lanes(sum.divisor)};
        if (lane == k) counted = sum;
        if (k == 0) all = sum;
      }
      set_totals(step, weights, rows, counted, all);
      if (lane < 2 && rows.begin == 0 && blockIdx.x == 0) {
        totals(step)[branches + lane] = {{0, 0}, lane == 0 ? 1. : 0., lane == 0 ? 1.f : 0.f};
      }
    }
  }
  /// Of the branch of each lane of a warp.
  static __device__ __forceinline__ void set_totals(const StepContext& step, Weights& weights,
                                                    RowRange rows, const StepCount& counted,
                                                    const StepCount& all) {
    const bool mean = step.loss.mean;
    const int k = threadIdx.x;
    const double alpha = alpha_of(step, k);
    double typical = mean_class_weight(step);
    if (step.plan.weighted && all.divisor > 0) typical *= all.divisor / double(all.rows);
    double weight = alpha;
    if (k > 0 && mean) {
      weight = counted.divisor > 0 ? alpha * (all.divisor / counted.divisor) : 0;
    }
    const double unit = set_branch_weight(step, weights, weight);
    if (k == 0) weights.row = 1 / typical;
    if (rows.begin == 0 && blockIdx.x == 0 && k < step.plan.branches) {
      double scale = alpha * typical * unit;
      if (mean) scale = counted.divisor > 0 ? scale / counted.divisor : 0;
      totals(step)[k] = {counted, scale, float(scale)};
    }
  }
  /// Of the branch of each lane of a warp. Returns what all weights were divided by, so that the
  /// nine branches that there are at most add up to what float16 can hold.
  static __device__ __forceinline__ double set_branch_weight(const StepContext& step,
                                                             Weights& weights, double weight) {
    double unit = 1;
    if constexpr (std::is_same_v<T, f16>) {
      constexpr double kMost = 4096;
      double largest = weight < 0 ? -weight : weight;
#pragma unroll 1
      for (int mask = 16; mask > 0; mask /= 2) {
        const double other = warp_exchange(largest, mask);
        if (other > largest) largest = other;
      }
      if (step.plan.mixed && largest > kMost) unit = largest / kMost;
    }
    if (int(threadIdx.x) < step.plan.branches) weights.branch[threadIdx.x] = weight / unit;
    return unit;
  }
  /// Of soft targets, whose class weights are in no divisor. By the lanes of a warp.
  static __device__ __forceinline__ double mean_class_weight(const StepContext& step) {
    const auto* weights = static_cast<const Accumulator*>(step.loss.class_weight);
    if (!std::is_same_v<T, f16> || step.loss.target || !weights) return 1;
    double sum = 0;
#pragma unroll 4
    for (int64_t c = threadIdx.x; c < step.classes; c += 32) sum += weights[c];
    sum = sum_lanes(sum);
    return sum > 0 ? sum / double(step.classes) : 1;
  }
};

}  // namespace dgl_ext
