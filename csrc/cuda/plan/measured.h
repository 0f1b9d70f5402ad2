// Every constant of the plans that a measurement or a guess has set, with where it comes from. When
// a GPU shows better ones, change them here.
#pragma once

#include <cstdint>

namespace dgl_ext {

/// Work of a step (flop of forward and backward together) below which one launch with our tiles
/// wins, and above which library products do. One NVIDIA H200, torch 2.11.0+cu130, 2026-11, by
/// arithmetic from the measured phases of version one (64x512x309: fused; 256x1024x1000: library).
constexpr double kFusedBelow = 1.2e9;

/// Library products lose efficiency in chunks of fewer rows: 16384x1024x32000 in bfloat16 took 27.6
/// ms by 512 rows, 25.6 by 1,024, 24.1 by 4,096 (one NVIDIA H200, same session).
constexpr int64_t kLeastChunkRows = 1024;
constexpr int64_t kDefaultWorkspace = int64_t(512) << 20;

// ---- guesses from counting: no GPU has measured them

/// The medium tile is taken where it makes at least this many tiles per multiprocessor: splits of k
/// then give every multiprocessor one.
constexpr double kMediumTilesPerMultiprocessor = 0.25;
/// Up to this many k-steps a CTA does all modalities itself rather than pay for a grid sync.
constexpr int64_t kDirectSteps = 8;
/// Sums over rows are split only into pieces of at least this many k-steps.
constexpr int64_t kLeastStepsPerRowSplit = 16;
/// Up to this many rows one CTA of the rows kernel counts those with a target; beyond, a launch of
/// its own does, with all CTAs.
constexpr int64_t kCountedByOneCta = 32768;
/// Up to so many bytes of two features of one width are copied beside each other where that makes
/// one call of two products: a launch takes about as long.
constexpr int64_t kCopiedFeatures = int64_t(4) << 20;
/// CTAs per multiprocessor of the library executor's kernels.
constexpr int kElementCtas = 2;

}  // namespace dgl_ext
