// What the plans of all heads are made of: tile, grid, splits, chunks, workspace.
#pragma once

#include <algorithm>

#include "plan.h"

namespace dgl_ext::planning {

// ---- values to be measured: every one below is a guess from counting, no GPU has seen it yet

/// Work (flop of forward and backward together) above which library GEMMs should win.
constexpr double kComposedAbove[] = {
    1e9,   // kFloat64: our SIMT instantiation is a simple one
    1e11,  // kFloat32, exact
    24e9,  // kBFloat16
    24e9,  // kFloat16
};
constexpr double kComposedAboveTf32 = 12e9;
/// A large tile is taken where it makes at least this many tiles per multiprocessor.
constexpr double kLargeTilesPerMultiprocessor = 0.5, kXLargeTilesPerMultiprocessor = 2;
/// Up to this many k-steps a CTA does all modalities itself rather than pay for a grid sync.
constexpr int64_t kDirectSteps = 8;
/// Sums over rows are split only into pieces of at least this many k-steps.
constexpr int64_t kLeastStepsPerRowSplit = 16;

// --------------------------------------------------------------------------------------------------

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
  Tile small, large, xlarge;
};
inline TileFamily family_of(Precision precision) {
  switch (precision.dtype) {
    case Dtype::kFloat64:
      return {Tile::kFloat64, Tile::kFloat64, Tile::kFloat64};
    case Dtype::kFloat32:
      return precision.allow_tf32
                 ? TileFamily{Tile::kTFloat32Small, Tile::kTFloat32Large, Tile::kTFloat32Large}
                 : TileFamily{Tile::kFloat32Small, Tile::kFloat32Large, Tile::kFloat32Large};
    default:
      return {Tile::kHalfSmall, Tile::kHalfLarge, Tile::kHalfXLarge};
  }
}

struct Output {
  int64_t rows = 0, columns = 0;
};
inline int64_t count_tiles(Tile tile, const Output* outputs, int count) {
  int64_t tiles = 0;
  for (int i = 0; i < count; ++i) {
    tiles += ceil_div(outputs[i].rows, shape_of(tile).rows) *
             ceil_div(outputs[i].columns, shape_of(tile).columns);
  }
  return tiles;
}

/// Tile, alignment and path for a launch that computes `outputs` with GEMMs.
inline LaunchShape choose_tile(Precision precision, bool operands_aligned, bool has_xlarge,
                               double flop, const Output* outputs, int count, const Device& device,
                               const PlanRequest& request) {
  LaunchShape launch;
  const bool tf32 = precision.dtype == Dtype::kFloat32 && precision.allow_tf32;
  const double bound =
      tf32 ? kComposedAboveTf32 : kComposedAbove[static_cast<int>(precision.dtype)];
  if (flop > bound && !request.force_kernel) launch.path = Path::kComposed;

  launch.aligned = operands_aligned && precision.dtype != Dtype::kFloat64;
  if (!launch.aligned) precision.allow_tf32 = false;  // the unaligned float32 kernel is exact
  const TileFamily family = family_of(precision);
  const auto resident = [&](Tile tile) { return device.resident_ctas[static_cast<int>(tile)]; };
  const auto fills = [&](Tile tile, double per_multiprocessor) {
    return resident(tile) > 0 &&
           double(count_tiles(tile, outputs, count)) >= per_multiprocessor * device.multiprocessors;
  };
  launch.tile = family.small;
  if (launch.aligned) {
    if (fills(family.large, kLargeTilesPerMultiprocessor)) launch.tile = family.large;
    if (has_xlarge && fills(family.xlarge, kXLargeTilesPerMultiprocessor)) {
      launch.tile = family.xlarge;
    }
    const Tile wanted = request.tile;
    const bool known =
        wanted == family.small || wanted == family.large || (has_xlarge && wanted == family.xlarge);
    if (request.choose_tile && known && resident(wanted) > 0) launch.tile = wanted;
  }
  // cp.async, mma.sync with these types and cooperative groups as used need sm_80
  if (device.capability < 80 || resident(launch.tile) == 0) launch.path = Path::kComposed;
  return launch;
}

/// CTAs for phases of at most `items` independent items: all that is useful, and no more than
/// are resident at once, which a grid-wide sync needs.
inline int choose_grid(const LaunchShape& launch, int64_t items, const Device& device) {
  int64_t limit = int64_t(device.resident_ctas[static_cast<int>(launch.tile)]) *
                  std::max(device.multiprocessors, 1);
  if (device.max_ctas > 0) limit = std::min<int64_t>(limit, device.max_ctas);
  return int(std::max<int64_t>(1, std::min(items, limit)));
}
/// CTAs that an element-wise phase, a warp per row, can use; one per multiprocessor is enough.
inline int64_t row_items(int64_t rows, const LaunchShape& launch, const Device& device) {
  const int64_t warps = shape_of(launch.tile).threads() / 32;
  return std::min<int64_t>(ceil_div(rows, warps), device.multiprocessors);
}

/// Splits k so that about `target` items exist; returns the elements per split.
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

/// Columns of a masked copy, 0 where none is needed.
inline int64_t masked_columns(const uint8_t* present, const Matrix& grad_weight, int64_t width) {
  return present && grad_weight.data ? padded(width) : 0;
}
/// Rows that a step works on at a time: all, or as many tiles of rows as fit, evenly.
inline int64_t choose_chunk(int64_t rows, int64_t row_bytes, int64_t limit, int64_t tile_rows) {
  const int64_t fit = std::max<int64_t>(limit, 0) / std::max<int64_t>(row_bytes, 1);
  if (fit >= rows) return std::max<int64_t>(rows, 1);
  const int64_t chunks = ceil_div(rows, std::max(fit / tile_rows * tile_rows, tile_rows));
  return round_up(ceil_div(rows, chunks), tile_rows);
}
inline int count_chunks(int64_t rows, int64_t chunk_rows) {
  return int(std::max<int64_t>(1, ceil_div(rows, chunk_rows)));
}
/// What CTAs tell each other, behind everything else in the workspace.
inline void place_sums(int grid, Layout& layout, StepPlan& plan) {
  const int64_t branches = plan.branches;
  plan.counts_offset = layout.add(grid * branches * int64_t(sizeof(int64_t)));
  plan.losses_offset = layout.add(grid * branches * int64_t(sizeof(StepSums)));
  plan.totals_offset = layout.add(branches * int64_t(sizeof(StepTotals)));
}

}  // namespace dgl_ext::planning
