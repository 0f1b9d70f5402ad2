// A row of logits, all branches of some of its columns at a time, read once from the partial sums
// that the products left: by a warp (few classes) or by a whole CTA.
//
// A Source says where the partial sums are. Its parts are those of the modalities, which add up to
// the fused logits and each make a branch (kAdds), or those of the branches themselves. Every
// thread keeps its columns in slots of shared memory that no other thread touches: registers could
// not be indexed by the branch, and unrolled over nine of them they spilled.
#pragma once

#include "cuda/kernels/phases.cuh"

namespace dgl_ext {

/// A warp or a CTA works on a row, each thread on up to kRuns runs of columns at a time. Where a
/// warp has more lanes than the row has runs, the others read other split planes.
template <class C, class Source, int kRuns>
class LogitRow {
 public:
  using Accumulator = typename C::Accumulator;
  using Slot = Vector<Accumulator, kRun>;
  static constexpr int kRunCount = kRuns;

  /// `slots` of them are there for each thread; `more` of them serve something beside the branches.
  __device__ __forceinline__ LogitRow(const Source& source, int64_t classes, bool by_warp,
                                      void* memory, int slots, int more)
      : source_(source),
        classes_(classes),
        slots_(static_cast<Slot*>(memory) + threadIdx.x),
        by_warp_(by_warp),
        lanes_(by_warp ? 32 : C::kThreads) {
    branches_ = source.parts() + Source::kAdds;
    runs_ = int(smaller(slots / (branches_ + more), kRuns));
    while (by_warp && lanes_ > 1 && int64_t(lanes_ / 2) * kRun >= classes) lanes_ /= 2;
    const int thread = by_warp ? threadIdx.x % 32 : threadIdx.x;
    lane_ = thread % lanes_;
    replica_ = thread / lanes_;
  }

  __device__ __forceinline__ bool by_warp() const { return by_warp_; }
  __device__ __forceinline__ int branches() const { return branches_; }
  __device__ __forceinline__ int parts() const { return source_.parts(); }
  /// Lanes that share a row's columns; those beyond the first `lanes` hold the same values.
  __device__ __forceinline__ int lanes() const { return lanes_; }
  __device__ __forceinline__ int lane() const { return lane_; }
  __device__ __forceinline__ bool is_first_replica() const { return replica_ == 0; }
  /// Columns that are held at a time.
  __device__ __forceinline__ int64_t width() const { return int64_t(lanes_) * runs_ * kRun; }
  __device__ __forceinline__ int64_t column(int run) const {
    return first_ + (int64_t(run) * lanes_ + lane_) * kRun;
  }
  /// Columns of a run that exist.
  __device__ __forceinline__ int count(int run) const {
    const int64_t left = classes_ - column(run);
    return run >= runs_ || left < 0 ? 0 : int(smaller(left, kRun));
  }
  __device__ __forceinline__ Slot& slot(int branch, int run) const {
    return slots_[(branch * runs_ + run) * C::kThreads];
  }

  /// Logits of row `row` from column `first` on. `taken` has a bit for every part that counts: what
  /// is stored of the others is not read.
  __device__ __forceinline__ void load(int64_t row, int64_t first, uint32_t taken) {
    first_ = first;
    Accumulator fused[kRuns][kRun];
    if constexpr (Source::kAdds) {
#pragma unroll
      for (int r = 0; r < kRuns; ++r) source_.read_fused_bias(column(r), count(r), fused[r]);
    }
    int64_t offset = 0;
#pragma unroll 1
    for (int i = 0; i < source_.parts(); ++i) {
      Accumulator sum[kRuns][kRun] = {};
      if (taken >> i & 1) add_part(i, row, offset, sum);
      offset += source_.part_step(i);
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        if (count(r) == 0) continue;
        Slot z;
        source_.read_bias_of(i, column(r), count(r), z.v);
#pragma unroll
        for (int e = 0; e < kRun; ++e) {
          if constexpr (Source::kAdds) fused[r][e] += sum[r][e];
          z.v[e] += sum[r][e];
        }
        slot(i + Source::kAdds, r) = z;
      }
    }
    if constexpr (Source::kAdds) {
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        if (count(r) == 0) continue;
        Slot z;
#pragma unroll
        for (int e = 0; e < kRun; ++e) z.v[e] = fused[r][e];
        slot(0, r) = z;
      }
    }
  }

 private:
  __device__ __forceinline__ void add_part(int i, int64_t row, int64_t offset,
                                           Accumulator (&sum)[kRuns][kRun]) {
    // Several loads in flight a thread: one after the other each would be a trip to L2. With more
    // runs those are enough, and registers are few.
    constexpr int kAhead = kRuns > 1 ? 1 : sizeof(Accumulator) == 8 ? 2 : 8;
    const int64_t splits = source_.splits(i), plane = source_.split_step();
    const int replicas = by_warp_ ? 32 / lanes_ : 1;
    const Accumulator* from = source_.at(row, column(0)) + offset;
    const int64_t run_step = int64_t(lanes_) * kRun;
#pragma unroll 1
    for (int64_t s = replica_; s < splits; s += int64_t(replicas) * kAhead) {
      Accumulator ahead[kAhead][kRuns][kRun];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t split = s + a * replicas;
#pragma unroll
        for (int r = 0; r < kRuns; ++r) {
          read_run<true>(from + r * run_step + split * plane, split < splits ? count(r) : 0,
                         ahead[a][r]);
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
#pragma unroll
        for (int r = 0; r < kRuns; ++r) {
#pragma unroll
          for (int e = 0; e < kRun; ++e) sum[r][e] += ahead[a][r][e];
        }
      }
    }
#pragma unroll 1
    for (int mask = lanes_; mask < 32; mask *= 2) {  // a CTA has 128 lanes
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
#pragma unroll
        for (int e = 0; e < kRun; ++e) sum[r][e] += warp_exchange(sum[r][e], mask);
      }
    }
  }

  const Source& source_;
  const int64_t classes_;
  Slot* const slots_;
  const bool by_warp_;
  int branches_, runs_, lanes_, lane_, replica_;
  int64_t first_ = 0;
};

}  // namespace dgl_ext
