// What the plans of all heads are made of: tile, grid, splits, chunks, workspace.
#pragma once

#include <algorithm>

#include "cuda/plan/plan.h"

namespace dgl_ext::planning {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

inline bool allows_16_byte_copies(const void* data, int64_t stride, Dtype dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_size(dtype) % 16 == 0;
}
inline bool allows_16_byte_copies(const ConstMatrix& m, Dtype dtype) {
  return allows_16_byte_copies(m.data, m.stride, dtype);
}
/// Columns of a workspace plane whose rows are 16-byte multiples, for elements down to 16 bits.
inline int64_t padded(int64_t columns) { return round_up(columns, 8); }

struct TileFamily {
  Tile small, medium;
};
inline TileFamily family_of(Precision precision) {
  switch (precision.dtype) {
    case Dtype::kFloat64:
      return {Tile::kFloat64, Tile::kFloat64};
    case Dtype::kFloat32:
      return precision.allow_tf32 ? TileFamily{Tile::kTFloat32Small, Tile::kTFloat32Medium}
                                  : TileFamily{Tile::kFloat32Small, Tile::kFloat32Medium};
    default:
      return {Tile::kHalfSmall, Tile::kHalfMedium};
  }
}

inline TileGrid tiles_of(Tile tile, int64_t rows, int64_t columns) {
  const int64_t across = ceil_div(columns, tile_shape(tile).columns);
  return {across, ceil_div(rows, tile_shape(tile).rows) * across};
}

struct OutputSize {
  int64_t rows = 0, columns = 0;
};

/// Executor, tile and alignment for a head that computes `outputs` by products.
inline LaunchShape choose_launch(Precision precision, bool operands_aligned, double flop,
                                 const OutputSize* outputs, int count, const Device& device,
                                 const PlanRequest& request) {
  LaunchShape launch;
  const Executor suited = flop < kFusedBelow ? Executor::kFused : Executor::kLibrary;
  launch.executor = request.executor.value_or(suited);

  launch.aligned = operands_aligned && precision.dtype != Dtype::kFloat64;
  if (!launch.aligned) precision.allow_tf32 = false;  // the unaligned float32 kernel is exact
  const TileFamily family = family_of(precision);
  const auto resident = [&](Tile tile) { return device.resident_ctas[static_cast<int>(tile)]; };
  launch.tile = family.small;
  if (launch.aligned) {
    const double wanted = kMediumTilesPerMultiprocessor * device.multiprocessors;
    int64_t tiles = 0;
    for (int i = 0; i < count; ++i) {
      tiles += tiles_of(family.medium, outputs[i].rows, outputs[i].columns).count;
    }
    if (resident(family.medium) > 0 && double(tiles) >= wanted) launch.tile = family.medium;
    const bool known = request.tile == family.small || request.tile == family.medium;
    if (known && resident(*request.tile) > 0) launch.tile = *request.tile;
  }
  if (resident(launch.tile) == 0 && launch.executor == Executor::kFused) {
    launch.executor = Executor::kLibrary;
  }
  // the element-wise kernels run on the small, unaligned tile's threads
  if (launch.executor == Executor::kLibrary) {
    precision.allow_tf32 = false;
    launch.tile = family_of(precision).small;
    launch.aligned = false;
  }
  launch.cooperative = launch.executor != Executor::kLibrary;
  // cp.async, mma.sync with these types and cooperative groups as used need sm_80
  if (device.capability < 80) launch.executor = Executor::kNone;
  return launch;
}

/// CTAs of the library executor's kernels.
inline int element_grid(const Device& device) {
  const int grid = kElementCtas * std::max(device.multiprocessors, 1);
  return device.max_ctas > 0 ? std::min(grid, device.max_ctas) : grid;
}
/// CTAs for phases of at most `items` independent items: all that is useful, and no more than
/// are resident at once, which a grid-wide sync needs.
inline int choose_grid(const LaunchShape& launch, int64_t items, const Device& device) {
  if (launch.executor == Executor::kLibrary) return element_grid(device);
  int64_t limit = int64_t(device.resident_ctas[static_cast<int>(launch.tile)]) *
                  std::max(device.multiprocessors, 1);
  if (device.max_ctas > 0) limit = std::min<int64_t>(limit, device.max_ctas);
  return int(std::max<int64_t>(1, std::min(items, limit)));
}
/// CTAs that a phase over rows can use; one per multiprocessor is enough.
inline int64_t row_items(int64_t rows, const Device& device) {
  return std::min<int64_t>(rows, device.multiprocessors);
}

/// Splits of k for `tiles` tiles, so that every multiprocessor has one.
inline int64_t choose_splits(const LaunchShape& launch, int64_t tiles, const Device& device,
                             const PlanRequest& request) {
  if (launch.executor == Executor::kLibrary) return 1;
  if (request.splits > 0) return request.splits;
  return device.multiprocessors / std::max<int64_t>(tiles, 1);
}
/// Splits k; returns the elements per split.
inline int64_t choose_depth(int64_t total_steps, int64_t splits, int64_t step) {
  total_steps = std::max<int64_t>(total_steps, 1);
  return ceil_div(total_steps, std::clamp<int64_t>(splits, 1, total_steps)) * step;
}

/// Splits of a sum over rows of `steps`, in a phase of `total` steps: no tile must take much longer
/// than an even share of the phase.
inline int64_t choose_row_splits(int64_t steps, int64_t total, const Device& device) {
  const int64_t share =
      std::max(ceil_div(total, std::max(device.multiprocessors, 1)), kLeastStepsPerRowSplit);
  return steps > 2 * share ? ceil_div(steps, share) : 1;
}

/// Hands out consecutive 16-byte aligned parts of the workspace.
class Layout {
 public:
  int64_t add(int64_t bytes) {
    const int64_t at = bytes_;
    bytes_ += round_up(bytes, 16);
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

/// Columns of a copy of features for the weight's gradient, 0 where none is needed.
inline int64_t copied_columns(bool copied, const Matrix& grad_weight, int64_t width) {
  return copied && grad_weight.data ? padded(width) : 0;
}
/// Rows that a step works on at a time: all, or as many tiles of rows as fit, evenly.
inline int64_t choose_chunk(int64_t rows, int64_t row_bytes, int64_t bytes, int64_t least_rows,
                            int64_t tile_rows) {
  const int64_t fit =
      std::max(std::max<int64_t>(bytes, 0) / std::max<int64_t>(row_bytes, 1), least_rows);
  if (fit >= rows) return std::max<int64_t>(rows, 1);
  const int64_t chunks = ceil_div(rows, std::max(fit / tile_rows * tile_rows, tile_rows));
  return round_up(ceil_div(rows, chunks), tile_rows);
}
inline int count_chunks(int64_t rows, int64_t chunk_rows) {
  return int(std::max<int64_t>(1, ceil_div(rows, chunk_rows)));
}
/// What of a step's gradients is wanted, and whether its planes mix branches.
inline void choose_gradients(bool features, bool parameters, const Leaks& leaks, StepPlan& plan) {
  plan.gradients = features || parameters;
  plan.mixed = (features && leaks.encoder != 0) || (parameters && leaks.head != 0);
}

/// The rest of a step's plan: who counts rows, the grid, and what CTAs tell each other, behind
/// everything else in the workspace. Where residuals need the counts, library's rows kernel needs
/// them from a launch before it.
inline void finish_step(int64_t items, const CrossEntropy& loss, const uint8_t* const* present,
                        int64_t rows, const Device& device, Layout& layout, LaunchShape& launch,
                        StepPlan& plan) {
  launch.grid = plan.counting_ctas = choose_grid(launch, items, device);
  bool masked = false;
  for (int k = 1; k < plan.branches; ++k) masked |= present[k - 1] != nullptr;
  plan.weighted = loss.sample_weight || loss.class_weight;
  plan.needs_counts = plan.weighted || (plan.mixed && loss.mean && masked);
  if (launch.executor == Executor::kLibrary) {
    plan.count_first = plan.needs_counts || rows > kCountedByOneCta;
    if (!plan.count_first) plan.counting_ctas = 1;
  }
  const int64_t branches = plan.branches;
  plan.counts_offset = layout.add(launch.grid * branches * int64_t(sizeof(StepCount)));
  plan.losses_offset = layout.add(launch.grid * branches * int64_t(sizeof(StepSums)));
  plan.totals_offset = layout.add((branches + 2) * int64_t(sizeof(StepTotals)));
  launch.workspace_bytes = layout.bytes();
}

}  // namespace dgl_ext::planning
