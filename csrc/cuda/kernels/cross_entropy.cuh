// The losses of a training step, for any head: softmax, losses and residuals by rows.
//
// A group of threads, a warp or a CTA, has all branches of a row in registers (rows.cuh): each
// partial sum is read once, up to about 2,048 classes, and twice beyond.
#pragma once

#include "cuda/kernels/peak.cuh"
#include "cuda/kernels/rows.cuh"
#include "cuda/kernels/step_counts.cuh"

namespace dgl_ext {

template <class C>
struct StepLosses : StepCounts<C> {
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;

 private:
  using Base = StepCounts<C>;
  using typename Base::Sums;
  using Peak = dgl_ext::Peak<Accumulator>;
  static constexpr int kMaxBranches = Base::kMaxBranches;
  static constexpr int kTogether = 3;  ///< branches whose reductions overlap

  /// Shared memory of run_rows: what the warps of a CTA tell each other of a row, twice, so that a
  /// row needs one barrier; then the slots of the threads. The last peak is that of soft targets.
  struct alignas(16) Shared {
    typename Base::Weights weights;
    Accumulator at_target[2][kMaxBranches][C::kWarps];
    Peak peaks[2][kMaxBranches + 1][C::kWarps];
  };

 public:
  /// For three branches of 2,048 classes, or nine of 512; half of that in float64. Soft targets
  /// take those of one branch more.
  static constexpr int kSlots = sizeof(Accumulator) == 8 ? 10 : 12;
  static constexpr int kSharedBytes =
      int(sizeof(Shared)) + kSlots * C::kThreads * kRun * int(sizeof(Accumulator));

  /// Losses, correct rows and residual planes of a chunk of rows; `source` has their logits. A grid
  /// sync must follow.
  template <class Source>
  static __device__ __forceinline__ void run_rows(const StepContext& step, T* shared, RowRange rows,
                                                  const Source& source) {
    Base::find_weights(step, reinterpret_cast<Shared*>(shared)->weights, rows);
    Sums sums;
    if (step.classes <= C::kThreads * kRun) {
      run_group<1>(step, shared, rows, source, sums);
    } else {
      run_group<sizeof(Accumulator) == 8 ? 2 : 4>(step, shared, rows, source, sums);
    }
    __syncthreads();  // shared memory is free again
    Base::add_to_sums(step, shared, rows, sums);
  }

 private:
  /// Rows one after the other, each by a warp (few classes) or by the CTA. Logits stay where they
  /// are if all columns fit; else a second sweep reads them again.
  template <int kRuns, class Source>
  static __device__ __forceinline__ void run_group(const StepContext& step, T* shared,
                                                   RowRange rows, const Source& source,
                                                   Sums& sums) {
    const RowRange mine = own_rows(rows.count);
    auto& board = *reinterpret_cast<Shared*>(shared);
    const bool by_warp = step.classes <= 32 * kRun;
    LogitRow<C, Source, kRuns> logits(source, step.classes, by_warp, &board + 1, kSlots,
                                      is_soft(step));
    int parity = 0;
#pragma unroll 1
    for (int64_t r = by_warp ? threadIdx.x / 32 : 0; r < mine.count; r += by_warp ? C::kWarps : 1) {
      run_row(step, board, rows, describe(step, board, rows, mine.begin + r), parity, logits, sums);
      parity ^= 1;
    }
  }

  struct RowOf {
    int64_t index, at, target;   ///< in the chunk, of all rows; -1: a soft target
    uint32_t present, counting;  ///< a bit per branch
    Accumulator weight;          ///< of the residuals
  };
  static __device__ __forceinline__ RowOf describe(const StepContext& step, const Shared& board,
                                                   RowRange rows, int64_t index) {
    RowOf row{index, rows.begin + index, -1, 1, 0, 1};
#pragma unroll 1
    for (int k = 1; k < step.plan.branches; ++k) {
      row.present |= uint32_t(!is_absent(step.present[k - 1], row.at)) << k;
    }
    if (!is_soft(step)) row.target = step.loss.target[row.at];
    if (is_soft(step) || row.target != step.loss.ignore_index) row.counting = row.present;
    if (step.plan.weighted) row.weight = board.weights.row * Base::sample_weight(step, row.at);
    return row;
  }
  static __device__ __forceinline__ bool is_soft(const StepContext& step) {
    return !step.loss.target;
  }
  /// Whether the loss takes the logits of all classes, not of the target's alone.
  static __device__ __forceinline__ bool is_dense(const StepContext& step) {
    return is_soft(step) || step.loss.label_smoothing != 0;
  }

  template <class Row>
  static __device__ __forceinline__ void run_row(const StepContext& step, Shared& board,
                                                 RowRange rows, const RowOf& row, int parity,
                                                 Row& logits, Sums& sums) {
    // Of absent features a part holds what is not to be read; a branch of FiLM is there always.
    const uint32_t taken = logits.parts() < logits.branches() ? row.present >> 1 : ~uint32_t(0);
    const bool once = step.classes <= logits.width();
    // Two sweeps over the columns where they do not fit: the first finds the sums.
#pragma unroll 1
    for (int sweep = once ? 1 : 0; sweep < 2; ++sweep) {
#pragma unroll 1
      for (int64_t first = 0; first < step.classes; first += logits.width()) {
        logits.load(row.index, first, taken);
        if (is_soft(step)) load_shares(step, row, logits);
        if (once || sweep == 0) {
          if (is_soft(step)) look_at_shares(board, parity, first == 0, logits);
#pragma unroll 1
          for (int k = 0; k < logits.branches(); k += kTogether) {
            look(step, board, row, parity, k, first == 0, logits);
          }
        }
        if (once) finish_row(step, board, row, parity, logits, sums);
        if (sweep == 0) continue;
        normalise(step, board, row, parity, once, logits);
        if (logits.is_first_replica()) write_residuals(step, board, rows, row, logits);
      }
      if (sweep == 0) finish_row(step, board, row, parity, logits, sums);
    }
  }

  /// Soft targets of the columns at hand, to the slots behind those of the branches.
  template <class Row>
  static __device__ __forceinline__ void load_shares(const StepContext& step, const RowOf& row,
                                                     const Row& logits) {
#pragma unroll 1
    for (int r = 0; r < Row::kRunCount && logits.count(r) > 0; ++r) {
      typename Row::Slot q;
      switch (step.loss.soft_dtype) {
        case Dtype::kFloat64:
          read_shares<double>(step, row, logits, r, q);
          break;
        case Dtype::kFloat32:
          read_shares<float>(step, row, logits, r, q);
          break;
        case Dtype::kBFloat16:
          read_shares<bf16>(step, row, logits, r, q);
          break;
        default:
          read_shares<f16>(step, row, logits, r, q);
      }
      logits.slot(logits.branches(), r) = q;
    }
  }
  template <class Stored, class Row>
  static __device__ __forceinline__ void read_shares(const StepContext& step, const RowOf& row,
                                                     const Row& logits, int r,
                                                     typename Row::Slot& to) {
    accumulator_t<Stored> v[kRun];
    read_run<Stored>(step.loss.soft_target, row.at, logits.column(r), logits.count(r), v);
#pragma unroll
    for (int e = 0; e < kRun; ++e) to.v[e] = Accumulator(v[e]);
  }

  /// What a perfect prediction would be at the columns of run r, weighted by class: the target,
  /// smoothed.
  template <class Row>
  static __device__ __forceinline__ void read_wanted(const StepContext& step, const RowOf& row,
                                                     const Row& logits, int r,
                                                     Accumulator (&t)[kRun]) {
    const double smoothing = step.loss.label_smoothing;
    const Accumulator rest = smoothing / double(step.classes);
    const int64_t column = logits.column(r);
    if (is_soft(step)) {
      const Accumulator share = 1 - smoothing;
      const auto q = logits.slot(logits.branches(), r);
#pragma unroll
      for (int e = 0; e < kRun; ++e) t[e] = share * q.v[e] + rest;
    } else {
      const Accumulator target_share = 1 - smoothing + smoothing / double(step.classes);
#pragma unroll
      for (int e = 0; e < kRun; ++e) t[e] = column + e == row.target ? target_share : rest;
    }
    if (!step.loss.class_weight) return;
    Accumulator w[kRun];
    read_run(static_cast<const Accumulator*>(step.loss.class_weight) + column, logits.count(r), w);
#pragma unroll
    for (int e = 0; e < kRun; ++e) t[e] *= w[e];
  }

  /// When all columns have been looked at: one thread per branch writes what is left of the row.
  template <class Row>
  static __device__ __forceinline__ void finish_row(const StepContext& step, const Shared& board,
                                                    const RowOf& row, int parity, const Row& logits,
                                                    Sums& sums) {
    if (logits.by_warp()) {
      warp_sync();
    } else {
      __syncthreads();
    }
    const int k = logits.by_warp() ? threadIdx.x % 32 : threadIdx.x;
    if (k >= logits.branches()) return;
    const int writer = logits.by_warp() ? threadIdx.x / 32 : 0;
    const Peak peak = peak_of_row(board, parity, k, logits.by_warp());
    const int64_t to = k * step.rows + row.at;
    step.loss.predictions[to] = peak.best;
    double loss = 0;
    if (row.counting >> k & 1) {
      loss = loss_of(step, row, peak, board.at_target[parity][k][writer]);
      sums.loss += loss * Base::sample_weight(step, row.at);
      int64_t label = row.target;
      if (is_soft(step)) label = peak_of_row(board, parity, kMaxBranches, logits.by_warp()).best;
      sums.correct += peak.best == label;
    }
    static_cast<Accumulator*>(step.loss.losses)[to] = Accumulator(loss);
  }

  /// The columns at hand become the softmax times what the row's target adds up to: from exp(logit
  /// - largest of the warp), or from logits.
  template <class Row>
  static __device__ __forceinline__ void normalise(const StepContext& step, const Shared& board,
                                                   const RowOf& row, int parity, bool once,
                                                   const Row& logits) {
#pragma unroll 1
    for (int k = 0; k < logits.branches(); ++k) {
      if (!(row.counting >> k & 1)) continue;
      const Peak peak = peak_of_row(board, parity, k, logits.by_warp());
      const Accumulator own = board.peaks[parity][k][threadIdx.x / 32].largest;
      const Accumulator mass =
          is_dense(step) ? Accumulator(peak.mass) : Base::target_weight(step, row.target);
      const Accumulator factor = mass * (once ? exponential(own - peak.largest) : 1) / peak.sum;
      for_each_logit(logits, k, [&](Accumulator z, int64_t) {
        return (once ? z : exponential(z - peak.largest)) * factor;
      });
    }
  }

  /// Replaces this thread's logits of branch k that are at hand by f(logit, column).
  template <class Row, class F>
  static __device__ __forceinline__ void for_each_logit(const Row& logits, int k, F&& f) {
#pragma unroll 1
    for (int r = 0; r < Row::kRunCount; ++r) {
      const int count = logits.count(r);
      if (count == 0) break;
      auto v = logits.slot(k, r);
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        if (e < count) v.v[e] = f(v.v[e], logits.column(r) + e);
      }
      logits.slot(k, r) = v;
    }
  }

  /// Takes the columns at hand of branches [begin, begin + kTogether) into what the board says of
  /// this warp. The logits become exp(logit - largest of the warp).
  template <class Row>
  static __device__ __forceinline__ void look(const StepContext& step, Shared& board,
                                              const RowOf& row, int parity, int begin, bool first,
                                              const Row& logits) {
    const int warp = threadIdx.x / 32, most = logits.lanes() < 32 ? logits.lanes() : 32;
    Peak peak[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const int k = begin + u;
      peak[u] = Peak::none();
      if (k >= logits.branches()) continue;
      for_each_logit(logits, k, [&](Accumulator z, int64_t column) {
        peak[u].take(z, column);
        if (column == row.target && logits.is_first_replica()) {
          board.at_target[parity][k][logits.by_warp() ? warp : 0] = z;
        }
        return z;
      });
      if (is_dense(step)) add_wanted(step, row, logits, k, peak[u]);
    }
    reduce_largest(most, peak);
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (begin + u >= logits.branches()) continue;
      for_each_logit(logits, begin + u, [&](Accumulator z, int64_t) {
        const Accumulator v = exponential(z - peak[u].largest);
        peak[u].sum += v;
        return v;
      });
    }
#pragma unroll 1
    for (int mask = most / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int u = 0; u < kTogether; ++u) peak[u].sum += warp_exchange(peak[u].sum, mask);
      if (!is_dense(step)) continue;
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        peak[u].mass += warp_exchange(peak[u].mass, mask);
        peak[u].wanted += warp_exchange(peak[u].wanted, mask);
      }
    }
    if (threadIdx.x % 32 != 0) return;
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (begin + u < logits.branches()) keep(board, parity, begin + u, first, peak[u]);
    }
  }
  /// The same of soft targets, of which the largest is all that matters.
  template <class Row>
  static __device__ __forceinline__ void look_at_shares(Shared& board, int parity, bool first,
                                                        const Row& logits) {
    Peak peak[1] = {Peak::none()};
    for_each_logit(logits, logits.branches(), [&](Accumulator q, int64_t column) {
      peak[0].take(q, column);
      return q;
    });
    reduce_largest(logits.lanes() < 32 ? logits.lanes() : 32, peak);
    if (threadIdx.x % 32 == 0) keep(board, parity, kMaxBranches, first, peak[0]);
  }
  template <int kCount>
  static __device__ __forceinline__ void reduce_largest(int lanes, Peak (&peak)[kCount]) {
#pragma unroll 1
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        const Accumulator largest = warp_exchange(peak[u].largest, mask);
        const uint32_t best = warp_exchange(peak[u].best, mask);
        if (peak[u].loses_to(largest, best)) {
          peak[u].largest = largest;
          peak[u].best = best;
        }
      }
    }
  }
  static __device__ __forceinline__ void keep(Shared& board, int parity, int k, bool first,
                                              const Peak& peak) {
    Peak& kept = board.peaks[parity][k][threadIdx.x / 32];
    if (first) {
      kept = peak;
    } else {
      kept.merge(peak);
    }
  }
  /// Sums of the target, and of target times logit, over this thread's columns of branch k.
  template <class Row>
  static __device__ __forceinline__ void add_wanted(const StepContext& step, const RowOf& row,
                                                    const Row& logits, int k, Peak& peak) {
    Accumulator mass = 0, wanted = 0;
#pragma unroll 1
    for (int r = 0; r < Row::kRunCount && logits.count(r) > 0; ++r) {
      Accumulator t[kRun];
      read_wanted(step, row, logits, r, t);
      const auto z = logits.slot(k, r);
#pragma unroll
      for (int e = 0; e < kRun; ++e) {
        if (e >= logits.count(r)) continue;
        mass += t[e];
        wanted += t[e] * z.v[e];
      }
    }
    peak.mass = mass;
    peak.wanted = wanted;
  }

  /// What the threads of a row know of branch k, warps in order.
  static __device__ __forceinline__ Peak peak_of_row(const Shared& board, int parity, int k,
                                                     bool by_warp) {
    if (by_warp) return board.peaks[parity][k][threadIdx.x / 32];
    Peak peak = board.peaks[parity][k][0];
#pragma unroll 1
    for (int w = 1; w < C::kWarps; ++w) peak.merge(board.peaks[parity][k][w]);
    return peak;
  }

  /// As in PyTorch a row with +inf or with nothing but -inf has no finite loss.
  static __device__ __forceinline__ double loss_of(const StepContext& step, const RowOf& row,
                                                   const Peak& peak, const Accumulator& at_target) {
    const Accumulator log_sum = logarithm(peak.sum);
    if (is_dense(step)) {
      return peak.mass * (double(log_sum) + double(peak.largest)) - peak.wanted;
    }
    return Base::target_weight(step, row.target) * (log_sum - (at_target - peak.largest));
  }

  static __device__ __forceinline__ T* plane_row(const StepContext& step, int plane, RowRange rows,
                                                 int64_t row) {
    return workspace_at<T>(step.workspace, step.plan.plane_offset) +
           (plane * rows.count + row) * step.plan.padded_classes;
  }

  /// Residuals of the columns at hand, in every plane: what the slots hold, less what is wanted.
  template <class Row>
  static __device__ __forceinline__ void write_residuals(const StepContext& step,
                                                         const Shared& board, RowRange rows,
                                                         const RowOf& row, const Row& logits) {
#pragma unroll 1
    for (int i = 0; i < step.plan.plane_count; ++i) {
      const StepPlane& plane = step.plan.planes[i];
      T* to = plane_row(step, i, rows, row.index);
      const auto leaks = [&](int k) { return k >= plane.begin && k < plane.end; };
#pragma unroll 1
      for (int r = 0; r < Row::kRunCount && logits.count(r) > 0; ++r) {
        Accumulator v[kRun] = {}, t[kRun];
        read_wanted(step, row, logits, r, t);
#pragma unroll 1
        for (int k = 0; k < logits.branches(); ++k) {
          if (!(row.counting >> k & 1) || (k != plane.first && !leaks(k))) continue;
          Accumulator weight = k == plane.first ? Accumulator(1) : Accumulator(plane.leak);
          if (step.plan.mixed) weight *= board.weights.branch[k];
          weight *= row.weight;
          const auto p = logits.slot(k, r);
#pragma unroll
          for (int e = 0; e < kRun; ++e) v[e] += weight * (p.v[e] - t[e]);
        }
        // what lies beyond the last column is padding
        write_run(to + logits.column(r), v, kRun);
      }
    }
  }
};

}  // namespace dgl_ext
