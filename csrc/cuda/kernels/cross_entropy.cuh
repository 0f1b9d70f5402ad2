// The losses of a training step, for any head: which rows count, softmax and residuals by rows,
// sums.
//
// A group of threads, a warp or a CTA, has all branches of a row in registers (rows.cuh): each
// partial sum is read once, up to about 2,048 classes, and twice beyond.
#pragma once

#include "cuda/kernels/peak.cuh"
#include "cuda/kernels/rows.cuh"
#include "cuda/kernels/step_context.cuh"

namespace dgl_ext {

template <class C>
struct StepLosses {
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;

 private:
  /// What a thread adds up over its rows: of branch k, in a thread that is the k-th of its group.
  struct Sums {
    double loss = 0;
    int64_t correct = 0;
  };
  using Peak = dgl_ext::Peak<Accumulator>;
  static constexpr int kMaxBranches = kMaxModalities + 1;
  static constexpr int kTogether = 3;  ///< branches whose reductions overlap

  /// Shared memory of run_rows: what the warps of a CTA tell each other of a row, twice, so that a
  /// row needs one barrier; then the slots of the threads.
  struct alignas(16) Shared {
    Accumulator weight[kMaxBranches];
    Accumulator at_target[2][kMaxBranches][C::kWarps];
    Peak peaks[2][kMaxBranches][C::kWarps];
  };

 public:
  /// For three branches of 2,048 classes, or nine of 512; half of that in float64.
  static constexpr int kSlots = sizeof(Accumulator) == 8 ? 9 : 12;
  static constexpr int kSharedBytes =
      int(sizeof(Shared)) + kSlots * C::kThreads * kRun * int(sizeof(Accumulator));

  /// Counts the rows of this CTA's share, before anything else is known of them: of counting_ctas
  /// CTAs. A grid sync or another launch must follow, or a barrier where one CTA counts all.
  static __device__ __forceinline__ void count(const StepContext& step, T* shared) {
    const int lane = threadIdx.x % 32;
    int64_t mine = 0;
#pragma unroll 1
    for (int64_t first = int64_t(blockIdx.x) * C::kThreads + threadIdx.x / 32 * 32;
         first < step.rows; first += int64_t(step.plan.counting_ctas) * C::kThreads) {
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

  /// Losses, correct rows and residual planes of a chunk of rows; `source` has their logits. A grid
  /// sync must follow.
  template <class Source>
  static __device__ __forceinline__ void run_rows(const StepContext& step, T* shared, RowRange rows,
                                                  const Source& source) {
    if (needs_totals(step) || (rows.begin == 0 && blockIdx.x == 0)) {
      find_totals(step, shared, rows);
    } else if (step.plan.mixed) {
      if (int(threadIdx.x) < step.plan.branches) {
        reinterpret_cast<Shared*>(shared)->weight[threadIdx.x] = alpha_of(step, threadIdx.x);
      }
      __syncthreads();
    }
    Sums sums;
    if (step.classes <= C::kThreads * kRun) {
      run_group<1>(step, shared, rows, source, sums);
    } else {
      run_group<sizeof(Accumulator) == 8 ? 2 : 4>(step, shared, rows, source, sums);
    }
    __syncthreads();  // shared memory is free again
    add_to_sums(step, shared, rows, sums);
  }

  /// One CTA sums what all have found; total, losses and correct rows are written.
  static __device__ __forceinline__ void finish(const StepContext& step, T* shared) {
    const StepPlan& plan = step.plan;
    auto* losses = reinterpret_cast<double*>(shared);
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int k = threadIdx.x / 32; k < plan.branches; k += C::kWarps) {
      double loss = 0;
      int64_t correct = 0;
#pragma unroll 1
      for (int64_t cta = lane; cta < step.plan.summing_ctas; cta += 32) {
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

  /// Rows one after the other, each by a warp (few classes) or by the CTA. Logits stay where they
  /// are if all columns fit; else a second sweep reads them again.
  template <int kRuns, class Source>
  static __device__ __forceinline__ void run_group(const StepContext& step, T* shared,
                                                   RowRange rows, const Source& source,
                                                   Sums& sums) {
    const RowRange mine = own_rows(rows.count);
    auto& board = *reinterpret_cast<Shared*>(shared);
    const bool by_warp = step.classes <= 32 * kRun;
    LogitRow<C, Source, kRuns> logits(source, step.classes, by_warp, &board + 1, kSlots);
    int parity = 0;
#pragma unroll 1
    for (int64_t r = by_warp ? threadIdx.x / 32 : 0; r < mine.count; r += by_warp ? C::kWarps : 1) {
      RowOf row{mine.begin + r, step.loss.target[rows.begin + mine.begin + r], 0};
      if (row.target != step.loss.ignore_index) {
        row.counting = 1;
#pragma unroll 1
        for (int k = 1; k < step.plan.branches; ++k) {
          const bool absent = is_absent(step.present[k - 1], rows.begin + row.index);
          row.counting |= uint32_t(!absent) << k;
        }
        run_row(step, board, rows, row, parity, logits, sums);
        parity ^= 1;
      } else if (logits.is_first_replica()) {
        clear_row(step, rows, row.index, logits);
      }
    }
  }

  struct RowOf {
    int64_t index, target;
    uint32_t counting;  // a bit per branch
  };

  template <class Row>
  static __device__ __forceinline__ void run_row(const StepContext& step, Shared& board,
                                                 RowRange rows, const RowOf& row, int parity,
                                                 Row& logits, Sums& sums) {
    const uint32_t taken = row.counting >> (logits.branches() - logits.parts());
    const bool once = step.classes <= logits.width();
    // Two sweeps over the columns where they do not fit: the first finds the sums.
#pragma unroll 1
    for (int sweep = once ? 1 : 0; sweep < 2; ++sweep) {
#pragma unroll 1
      for (int64_t first = 0; first < step.classes; first += logits.width()) {
        logits.load(row.index, first, taken);
        if (once || sweep == 0) {
#pragma unroll 1
          for (int k = 0; k < logits.branches(); k += kTogether) {
            look(step, board, row, parity, k, first == 0, logits);
          }
        }
        if (once) finish_row(step, board, row, parity, logits, sums);
        if (sweep == 0) continue;
        normalise(board, row, parity, once, logits);
        if (logits.is_first_replica()) write_residuals(step, board, rows, row, logits);
      }
      if (sweep == 0) finish_row(step, board, row, parity, logits, sums);
    }
  }

  /// When all columns have been looked at: one thread per branch adds up its loss.
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
    if (k >= logits.branches() || !(row.counting >> k & 1)) return;
    const int writer = logits.by_warp() ? threadIdx.x / 32 : 0;
    add_loss(step, row.target, peak_of_row(board, parity, k, logits.by_warp()),
             board.at_target[parity][k][writer], sums);
  }

  /// The columns at hand become the softmax: from exp(logit - largest of the warp), or from logits.
  template <class Row>
  static __device__ __forceinline__ void normalise(const Shared& board, const RowOf& row,
                                                   int parity, bool once, const Row& logits) {
#pragma unroll 1
    for (int k = 0; k < logits.branches(); ++k) {
      if (!(row.counting >> k & 1)) continue;
      const Peak peak = peak_of_row(board, parity, k, logits.by_warp());
      const Accumulator own = board.peaks[parity][k][threadIdx.x / 32].largest;
      const Accumulator factor = (once ? exponential(own - peak.largest) : 1) / peak.sum;
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
    const bool smooth = step.loss.label_smoothing != 0;
    Peak peak[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      const int k = begin + u;
      peak[u] = Peak::none();
      if (!(row.counting >> k & 1)) continue;
      Accumulator plain = 0;
      for_each_logit(logits, k, [&](Accumulator z, int64_t column) {
        if (Peak::beats(z, peak[u].largest)) {
          peak[u].largest = z;
          peak[u].best = uint32_t(column);
        } else if (peak[u].best == Peak::kNone) {
          peak[u].best = uint32_t(column);  // -inf may be all there is
        }
        if (column == row.target && logits.is_first_replica()) {
          board.at_target[parity][k][logits.by_warp() ? warp : 0] = z;
        }
        plain += z;
        return z;
      });
      if (smooth) peak[u].plain = plain;
    }
#pragma unroll 1
    for (int mask = most / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        const Accumulator largest = warp_exchange(peak[u].largest, mask);
        const uint32_t best = warp_exchange(peak[u].best, mask);
        if (peak[u].loses_to(largest, best)) {
          peak[u].largest = largest;
          peak[u].best = best;
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (!(row.counting >> (begin + u) & 1)) continue;
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
      if (!smooth) continue;
#pragma unroll
      for (int u = 0; u < kTogether; ++u) peak[u].plain += warp_exchange(peak[u].plain, mask);
    }
    if (threadIdx.x % 32 != 0) return;
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (!(row.counting >> (begin + u) & 1)) continue;
      Peak& kept = board.peaks[parity][begin + u][warp];
      if (first) {
        kept = peak[u];
      } else {
        kept.merge(peak[u]);
      }
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

  /// As in PyTorch a row with +inf or with nothing but -inf has no finite loss.
  static __device__ __forceinline__ void add_loss(const StepContext& step, int64_t target,
                                                  const Peak& peak, Accumulator at_target,
                                                  Sums& sums) {
    const Accumulator log_sum = logarithm(peak.sum);
    double loss = log_sum - (at_target - peak.largest);
    if (step.loss.label_smoothing != 0) {
      const double smoothing = step.loss.label_smoothing;
      const double uniform = log_sum + (double(peak.largest) - peak.plain / double(step.classes));
      loss = (1 - smoothing) * loss + smoothing * uniform;
    }
    sums.loss += loss;
    sums.correct += peak.best == target;
  }

  static __device__ __forceinline__ T* plane_row(const StepContext& step, int plane, RowRange rows,
                                                 int64_t row) {
    return workspace_at<T>(step.workspace, step.plan.plane_offset) +
           (plane * rows.count + row) * step.plan.padded_classes;
  }

  /// Residuals of the columns at hand, in every plane: the softmax that the slots hold, less what a
  /// perfect prediction would be, one-hot or smoothed.
  template <class Row>
  static __device__ __forceinline__ void write_residuals(const StepContext& step,
                                                         const Shared& board, RowRange rows,
                                                         const RowOf& row, const Row& logits) {
    const double smoothing = step.loss.label_smoothing;
    const Accumulator rest = smoothing / double(step.classes);
    const Accumulator target_share = 1 - smoothing + smoothing / double(step.classes);
#pragma unroll 1
    for (int i = 0; i < step.plan.plane_count; ++i) {
      const StepPlane& plane = step.plan.planes[i];
      T* to = plane_row(step, i, rows, row.index);
      const auto leaks = [&](int k) { return k >= plane.begin && k < plane.end; };
#pragma unroll 1
      for (int r = 0; r < Row::kRunCount && logits.count(r) > 0; ++r) {
        const int64_t column = logits.column(r);
        Accumulator v[kRun] = {};
#pragma unroll 1
        for (int k = 0; k < logits.branches(); ++k) {
          if (!(row.counting >> k & 1) || (k != plane.first && !leaks(k))) continue;
          Accumulator weight = k == plane.first ? Accumulator(1) : Accumulator(plane.leak);
          if (step.plan.mixed) weight *= board.weight[k];
          const auto p = logits.slot(k, r);
#pragma unroll
          for (int e = 0; e < kRun; ++e) {
            v[e] += weight * (p.v[e] - (column + e == row.target ? target_share : rest));
          }
        }
        write_run(to + column, v, kRun);  // what lies beyond the last column is padding
      }
    }
  }
  template <class Row>
  static __device__ __forceinline__ void clear_row(const StepContext& step, RowRange rows,
                                                   int64_t row, const Row& logits) {
    const Accumulator zeros[kRun] = {};
    const int thread = logits.by_warp() ? threadIdx.x % 32 : threadIdx.x;
#pragma unroll 1
    for (int i = 0; i < step.plan.plane_count; ++i) {
      T* to = plane_row(step, i, rows, row);
#pragma unroll 1
      for (int64_t c = thread * kRun; c < step.classes; c += logits.lanes() * kRun) {
        write_run(to + c, zeros, kRun);
      }
    }
  }

  static __device__ __forceinline__ double alpha_of(const StepContext& step, int k) {
    return k == 0 ? 1 : step.loss.alpha[k - 1];
  }
  /// Whether planes mix branches whose means divide by different numbers of rows.
  static __device__ __forceinline__ bool needs_totals(const StepContext& step) {
    bool masked = false;
    for (int k = 1; k < step.plan.branches; ++k) masked |= step.present[k - 1] != nullptr;
    return step.plan.mixed && step.loss.mean && masked;
  }

  /// From all CTAs' counts: the weights of the branches in planes that mix them, in shared memory;
  /// one CTA of the launch writes the totals.
  static __device__ __forceinline__ void find_totals(const StepContext& step, T* shared,
                                                     RowRange rows) {
    const int lane = threadIdx.x % 32, branches = step.plan.branches;
    if (threadIdx.x < 32) {
      int64_t counted = 0;
#pragma unroll 1
      for (int k = 0; k < branches; ++k) {
        int64_t sum = 0;
#pragma unroll 1
        for (int64_t cta = lane; cta < step.plan.counting_ctas; cta += 32) {
          sum += counts(step)[cta * branches + k];
        }
        sum = sum_lanes(sum);
        if (lane == k) counted = sum;
      }
      const int64_t all = warp_broadcast(counted, 0);
      if (lane < branches) set_totals(step, shared, rows, lane, counted, all);
      if (lane < 2 && rows.begin == 0 && blockIdx.x == 0) {
        totals(step)[branches + lane] = {0, lane == 0 ? 1. : 0., lane == 0 ? 1.f : 0.f};
      }
    }
    __syncthreads();
  }
  static __device__ __forceinline__ void set_totals(const StepContext& step, T* shared,
                                                    RowRange rows, int k, int64_t counted,
                                                    int64_t all) {
    const bool mean = step.loss.mean;
    const double alpha = alpha_of(step, k);
    if (rows.begin == 0 && blockIdx.x == 0) {
      const double scale = !mean ? alpha : counted > 0 ? alpha / double(counted) : 0;
      totals(step)[k] = {counted, scale, float(scale)};
    }
    double weight = alpha;
    if (k > 0 && mean) weight = counted > 0 ? alpha * (double(all) / double(counted)) : 0;
    reinterpret_cast<Shared*>(shared)->weight[k] = weight;
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
};

}  // namespace dgl_ext
