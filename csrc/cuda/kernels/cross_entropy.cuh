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

  /// Of a dense target: its sum, and that of target times logit.
  struct Wanted {
    double mass, dot;
  };

  /// Shared memory of run_rows: what the warps of a CTA tell each other of a row, twice, so that a
  /// row needs one barrier; then the slots of the threads. The last peak is that of soft targets.
  struct alignas(16) Shared {
    typename Base::Weights weights;
    Wanted wanted[2][kMaxBranches][C::kWarps];
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
    const int64_t end = mine.begin + mine.count;
    int parity = 0;
#pragma unroll 1
    for (int64_t index = mine.begin + (by_warp ? threadIdx.x / 32 : 0); index < end;
         index += by_warp ? C::kWarps : 1) {
      run_row(step, board, rows, describe(step, rows, index), parity, logits, sums);
      parity ^= 1;
    }
  }

  struct RowOf {
    int64_t index, target;  ///< row of the chunk; -1: a soft target
    uint32_t present;       ///< a bit per branch
    bool labelled;

    __device__ __forceinline__ bool counts(int k) const { return labelled && (present >> k & 1); }
  };
  static __device__ __forceinline__ RowOf describe(const StepContext& step, RowRange rows,
                                                   int64_t index) {
    RowOf row{index, -1, 1, true};
#pragma unroll 1
    for (int k = 1; k < step.plan.branches; ++k) {
      row.present |= uint32_t(!is_absent(step.present[k - 1], rows.begin + index)) << k;
    }
    if (is_soft(step)) return row;
    row.target = step.loss.target[rows.begin + index];
    row.labelled = row.target != step.loss.ignore_index;
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
        if (is_soft(step)) load_shares(step, rows.begin + row.index, logits);
        if (once || sweep == 0) {
          if (is_soft(step)) look_at_shares(board, parity, first == 0, logits);
          if (is_dense(step)) look_at_wanted(step, board, row, parity, first == 0, logits);
#pragma unroll 1
          for (int k = 0; k < logits.branches(); k += kTogether) {
            look(board, row, parity, k, first == 0, logits);
          }
        }
        if (once) finish_row(step, board, rows, row, parity, logits, sums);
        if (sweep == 0) continue;
        normalise(step, board, row, parity, once, logits);
        if (logits.is_first_replica()) write_residuals(step, board, rows, row, logits);
      }
      if (sweep == 0) finish_row(step, board, rows, row, parity, logits, sums);
    }
  }

  /// Soft targets of the columns at hand, to the slots behind those of the branches.
  template <class Row>
  static __device__ __forceinline__ void load_shares(const StepContext& step, int64_t row,
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
  static __device__ __forceinline__ void read_shares(const StepContext& step, int64_t row,
                                                     const Row& logits, int r,
                                                     typename Row::Slot& to) {
    accumulator_t<Stored> v[kRun];
    read_run<Stored>(step.loss.soft_target, row, logits.column(r), logits.count(r), v);
#pragma unroll
    for (int e = 0; e < kRun; ++e) to.v[e] = Accumulator(v[e]);
  }

  /// What a perfect prediction would be at the columns of run r, weighted by class: the target,
  /// smoothed.
  template <class Row>
  static __device__ __forceinline__ void read_wanted(const StepContext& step, const Shared& board,
                                                     const RowOf& row, const Row& logits, int r,
                                                     Accumulator (&t)[kRun]) {
    const Accumulator share = board.weights.target, rest = board.weights.rest;
    const int64_t column = logits.column(r);
    if (is_soft(step)) {
      const auto q = logits.slot(logits.branches(), r);
#pragma unroll
      for (int e = 0; e < kRun; ++e) t[e] = share * q.v[e] + rest;
    } else {
#pragma unroll
      for (int e = 0; e < kRun; ++e) t[e] = column + e == row.target ? share + rest : rest;
    }
    if (!step.loss.class_weight) return;
    Accumulator w[kRun];
    read_run(static_cast<const Accumulator*>(step.loss.class_weight) + column, logits.count(r), w);
#pragma unroll
    for (int e = 0; e < kRun; ++e) t[e] *= w[e];
  }

  /// When all columns have been looked at: one thread per branch writes what is left of the row. As
  /// in PyTorch a row with +inf or with nothing but -inf has no finite loss.
  template <class Row>
  static __device__ __forceinline__ void finish_row(const StepContext& step, const Shared& board,
                                                    RowRange rows, const RowOf& row, int parity,
                                                    const Row& logits, Sums& sums) {
    if (logits.by_warp()) {
      warp_sync();
    } else {
      __syncthreads();
    }
    const int k = logits.by_warp() ? threadIdx.x % 32 : threadIdx.x;
    if (k >= logits.branches()) return;
    const int writer = logits.by_warp() ? threadIdx.x / 32 : 0;
    const Peak peak = peak_of_row(board, parity, k, logits.by_warp());
    const int64_t at = rows.begin + row.index, to = k * step.rows + at;
    step.loss.predictions[to] = peak.best;
    double loss = 0;
    if (row.counts(k)) {
      if (is_dense(step)) {
        const Wanted wanted = wanted_of_row(board, parity, k, logits.by_warp());
        loss = wanted.mass * (double(logarithm(peak.sum)) + double(peak.largest)) - wanted.dot;
      } else {
        loss = Base::target_weight(step, row.target) *
               (logarithm(peak.sum) - (board.at_target[parity][k][writer] - peak.largest));
      }
      sums.loss += loss * Base::sample_weight(step, at);
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
      if (!row.counts(k)) continue;
      const Peak peak = peak_of_row(board, parity, k, logits.by_warp());
      const Accumulator own = board.peaks[parity][k][threadIdx.x / 32].largest;
      const Accumulator mass =
          is_dense(step) ? Accumulator(wanted_of_row(board, parity, k, logits.by_warp()).mass)
                         : Base::target_weight(step, row.target);
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
  static __device__ __forceinline__ void look(Shared& board, const RowOf& row, int parity,
                                              int begin, bool first, const Row& logits) {
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
  /// Sums of a dense target, and of target times logit, over the columns at hand of all branches.
  template <class Row>
  static __device__ __forceinline__ void look_at_wanted(const StepContext& step, Shared& board,
                                                        const RowOf& row, int parity, bool first,
                                                        const Row& logits) {
#pragma unroll 1
    for (int k = 0; k < logits.branches(); ++k) {
      Accumulator of_target = 0, of_product = 0;
#pragma unroll 1
      for (int r = 0; r < Row::kRunCount && logits.count(r) > 0; ++r) {
        Accumulator t[kRun];
        read_wanted(step, board, row, logits, r, t);
        const auto z = logits.slot(k, r);
#pragma unroll
        for (int e = 0; e < kRun; ++e) {
          if (e >= logits.count(r)) continue;
          of_target += t[e];
          of_product += t[e] * z.v[e];
        }
      }
      double mass = of_target, dot = of_product;
#pragma unroll 1
      for (int mask = (logits.lanes() < 32 ? logits.lanes() : 32) / 2; mask > 0; mask /= 2) {
        mass += warp_exchange(mass, mask);
        dot += warp_exchange(dot, mask);
      }
      if (threadIdx.x % 32 != 0) continue;
      Wanted& kept = board.wanted[parity][k][threadIdx.x / 32];
      if (!first) {
        mass += kept.mass;
        dot += kept.dot;
      }
      kept = {mass, dot};
    }
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

  static __device__ __forceinline__ Wanted wanted_of_row(const Shared& board, int parity, int k,
                                                         bool by_warp) {
    if (by_warp) return board.wanted[parity][k][threadIdx.x / 32];
    Wanted sum{0, 0};
#pragma unroll 1
    for (int w = 0; w < C::kWarps; ++w) {
      sum.mass += board.wanted[parity][k][w].mass;
      sum.dot += board.wanted[parity][k][w].dot;
    }
    return sum;
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
      const GradientPlane& plane = step.plan.planes[i];
      T* to = plane_row(step, i, rows, row.index);
      const auto leaks = [&](int k) { return k >= plane.begin && k < plane.end; };
#pragma unroll 1
      for (int r = 0; r < Row::kRunCount && logits.count(r) > 0; ++r) {
        Accumulator v[kRun] = {}, all = 0;
#pragma unroll 1
        for (int k = 0; k < logits.branches(); ++k) {
          if (!row.counts(k) || (k != plane.first && !leaks(k))) continue;
          Accumulator weight = k == plane.first ? Accumulator(1) : Accumulator(plane.leak);
          if (step.plan.mixed) weight *= board.weights.branch[k];
          all += weight;
          const auto p = logits.slot(k, r);
#pragma unroll
          for (int e = 0; e < kRun; ++e) v[e] += weight * p.v[e];
        }
        Accumulator t[kRun];
        read_wanted(step, board, row, logits, r, t);
        const Accumulator of_row =
            step.plan.weighted
                ? board.weights.row * Base::sample_weight(step, rows.begin + row.index)
                : Accumulator(1);
#pragma unroll
        for (int e = 0; e < kRun; ++e) v[e] = of_row * (v[e] - all * t[e]);
        // what lies beyond the last column is padding
        write_run(to + logits.column(r), v, kRun);
      }
    }
  }
};

}  // namespace dgl_ext
