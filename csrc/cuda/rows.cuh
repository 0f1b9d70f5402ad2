// A row of logits in registers: all branches of some of its columns, read once from the partial
// sums that the products left, by a warp (few classes) or by a whole CTA.
//
// A Source says where the partial sums are. Its parts are those of the modalities, which add up to
// the fused logits and each make a branch (kAdds), or those of the branches themselves.
#pragma once

#include "phases.cuh"

namespace dgl_ext {

/// Threads [0, kGroup) work on a row, kRuns runs of columns each at a time. Where a warp has more
/// lanes than the row has runs, the others read other split planes.
template <class C, class Source, int kGroup, int kParts, int kRuns>
class LogitRow {
 public:
  using Accumulator = typename C::Accumulator;
  static constexpr int kBranches = kParts + (Source::kAdds ? 1 : 0);
  static constexpr int kPartCount = kParts, kRunCount = kRuns;
  static constexpr bool kByWarp = kGroup == 32;

  __device__ __forceinline__ LogitRow(const Source& source, int64_t classes)
      : source_(source), classes_(classes), lanes_(kGroup) {
    while (kByWarp && lanes_ > 1 && (lanes_ / 2) * kRun >= classes) lanes_ /= 2;
    const int thread = kByWarp ? threadIdx.x % 32 : threadIdx.x;
    lane_ = thread % lanes_;
    replica_ = thread / lanes_;
  }

  /// Lanes that share a row's columns; those beyond the first `lanes` hold the same values.
  __device__ __forceinline__ int lanes() const { return lanes_; }
  __device__ __forceinline__ bool is_first_replica() const { return replica_ == 0; }
  /// Columns that are held at a time.
  __device__ __forceinline__ int64_t width() const { return int64_t(lanes_) * kRuns * kRun; }
  __device__ __forceinline__ int64_t column(int run) const {
    return first_ + (int64_t(run) * lanes_ + lane_) * kRun;
  }
  __device__ __forceinline__ int count(int run) const {
    const int64_t left = classes_ - column(run);
    return left < 0 ? 0 : int(smaller(left, kRun));
  }
  /// The lane of the group that holds a column.
  __device__ __forceinline__ int owner(int64_t column) const {
    return int(column / kRun % lanes_);
  }

  /// Logits of row `row` from column `first` on. `taken` has a bit for every part that counts: what
  /// is stored of the others is not read.
  __device__ __forceinline__ void load(int64_t row, int64_t first, uint32_t taken) {
    first_ = first;
    if constexpr (Source::kAdds) {
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        if (count(r) > 0) source_.read_fused_bias(column(r), count(r), z[0][r]);
      }
    }
    int64_t offset = 0;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (i >= source_.parts()) break;
      constexpr int kShift = Source::kAdds ? 1 : 0;
      Accumulator sum[kRuns][kRun] = {};
      if (taken >> i & 1) add_part(i, row, offset, sum);
      offset += source_.part_step(i);
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        if (count(r) == 0) continue;
        source_.read_bias_of(i, column(r), count(r), z[i + kShift][r]);
#pragma unroll
        for (int e = 0; e < kRun; ++e) {
          if constexpr (Source::kAdds) z[0][r][e] += sum[r][e];
          z[i + kShift][r][e] += sum[r][e];
        }
      }
    }
  }

  Accumulator z[kBranches][kRuns][kRun];

 private:
  __device__ __forceinline__ void add_part(int i, int64_t row, int64_t offset,
                                           Accumulator (&sum)[kRuns][kRun]) {
    // 8 loads in flight a thread: one after the other each would be a trip to L2
    constexpr int kAhead = kRuns >= 4 ? 2 : 8 / kRuns;
    const int64_t splits = source_.splits(i), plane = source_.split_step();
    const int replicas = kByWarp ? 32 / lanes_ : 1;
#pragma unroll 1
    for (int64_t s = replica_; s < splits; s += int64_t(replicas) * kAhead) {
      Accumulator ahead[kAhead][kRuns][kRun];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t split = s + a * replicas;
#pragma unroll
        for (int r = 0; r < kRuns; ++r) {
          const Accumulator* from = source_.at(row, column(r)) + offset + split * plane;
          read_run(from, split < splits ? count(r) : 0, ahead[a][r]);
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
    if constexpr (kByWarp) {
#pragma unroll 1
      for (int mask = lanes_; mask < 32; mask *= 2) {
#pragma unroll
        for (int r = 0; r < kRuns; ++r) {
#pragma unroll
          for (int e = 0; e < kRun; ++e) sum[r][e] += warp_exchange(sum[r][e], mask);
        }
      }
    }
  }

  const Source& source_;
  const int64_t classes_;
  int lanes_, lane_, replica_;
  int64_t first_ = 0;
};

}  // namespace dgl_ext
