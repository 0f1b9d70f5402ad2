// How a head runs: path, tile, splits, grid, workspace. Pure functions of the problem's sizes and
// alignments, the dtype and the device: they read no memory behind the problem's pointers, call
// nothing of CUDA, and are tested without a GPU.
#pragma once

#include <cstdint>
#include <optional>

#include "common/problem.h"
#include "cuda/plan/measured.h"

namespace dgl_ext {

/// One configuration of the GEMM tile; see kTileShapes. Half tiles serve bf16 and fp16.
enum class Tile {
  kFloat64,
  kFloat32Small,
  kFloat32Medium,
  kTFloat32Small,
  kTFloat32Medium,
  kHalfSmall,
  kHalfMedium,
};
constexpr int kTileCount = 7;

struct TileShape {
  int rows, columns, depth;  ///< output tile, and elements of k per step
  int stages;                ///< depth of the copy pipeline
  int warps_m, warps_n;
  int min_ctas;  ///< per multiprocessor: what the register count is limited for
  bool tensor_cores;
  constexpr int threads() const { return 32 * warps_m * warps_n; }
};

/// Small: many tiles, for problems bound by latency. Medium: more reuse, for the sizes up to where
/// library products win.
constexpr TileShape kTileShapes[kTileCount] = {
    {32, 32, 16, 3, 2, 2, 3, false},  // kFloat64
    {32, 32, 32, 3, 2, 2, 3, false},  // kFloat32Small
    {64, 64, 16, 4, 2, 2, 2, false},  // kFloat32Medium
    {32, 32, 32, 3, 2, 2, 3, true},   // kTFloat32Small
    {64, 64, 32, 3, 2, 2, 2, true},   // kTFloat32Medium
    {32, 32, 64, 3, 2, 2, 3, true},   // kHalfSmall
    {64, 64, 64, 3, 2, 2, 2, true},   // kHalfMedium
};
constexpr const TileShape& tile_shape(Tile tile) { return kTileShapes[static_cast<int>(tile)]; }

constexpr int kColumnTile = 32;  ///< columns of one bias sum

/// The row-major matrix of tiles that covers an output. Part of a plan, which is a kernel argument:
/// the tile loops read it from constant memory, where values computed in the kernel would sit in
/// registers next to the accumulators.
struct TileGrid {
  int64_t across = 0, count = 0;  ///< count 0: not wanted
};

/// What the plan needs to know of a GPU; launch.h has the query.
struct Device {
  int multiprocessors = 0;
  int capability = 0;  ///< 10 * major + minor
  /// CTAs of the given tile that one multiprocessor holds, the least over all kernels that use
  /// the tile; 0: the tile does not run here (too little shared memory).
  int resident_ctas[kTileCount] = {};
  int max_ctas = 0;  ///< bound on any grid, to leave room for others (NCCL); 0: none
};

struct Precision {
  Dtype dtype = Dtype::kFloat32;
  bool allow_tf32 = false;  ///< float32 may use tf32 tensor cores
};

/// Who computes the products of a head. The element-wise phases are the same device code for both.
enum class Executor {
  kFused,    ///< our tiles: the whole head is one launch, with grid-wide syncs
  kLibrary,  ///< cuBLAS on views, with kernels for the element-wise phases between
  kNone,     ///< neither can run on this GPU
};

/// What every launch needs to know.
struct LaunchShape {
  Executor executor = Executor::kFused;
  Tile tile = Tile::kFloat32Small;
  bool aligned = false;      ///< every GEMM operand allows 16-byte copies
  bool cooperative = false;  ///< the launch contains a grid-wide sync
  int grid = 1;
  int64_t workspace_bytes = 0;  ///< to be 16-byte aligned; contents undefined before and after
};

/// Forward of concat and sum. Direct: a CTA computes all modalities of its tile
/// and writes the logits, no sync. Otherwise partial sums go to the workspace, modality by
/// modality in `splits[i]` pieces of `split_depth` elements, and are added after a sync.
struct LinearForwardPlan {
  LaunchShape launch;
  bool direct = true;
  int64_t splits[kMaxModalities] = {};
  int64_t split_depth = 0;
  TileGrid tiles;
  int64_t items = 0;           ///< tiles, or tiles times all splits
  int64_t plane_rows = 0;      ///< of the workspace planes
  int64_t padded_classes = 0;  ///< row pitch of the workspace planes
};

/// A GEMM operand of the backward launch: incoming gradient number `gradient` (0 fused, i + 1
/// unimodal i) or, where `plane` >= 0, that workspace plane; the product is scaled by `scale`. In a
/// step it is always a plane, and `gradient` is the branch whose scale the device found out.
struct GradientSource {
  int gradient = -1, plane = -1;  ///< both -1: nothing flows here
  double scale = 1;
};

/// Workspace plane = gradient[first] + leak * the sum of gradient[k] over the branches k in
/// [begin, end). In a backward launch without any k it is a padded copy, made where a gradient's
/// rows do not allow 16-byte copies but everything else does.
///
/// In a step the gradients are w_k times the residual of branch k (0 fused), where w_0 = 1 and w_k
/// = alpha_k n / n_k, or 1 where nothing is mixed.
struct GradientPlane {
  int first = 0, begin = 0, end = 0;
  double leak = 0;
};

/// Features whose rows may be absent are copied to the workspace, with zeros for those rows, before
/// rows are summed over: a mask in the tile loader would cost registers in the hottest loop. For
/// the library, two features that do not lie in order may be copied for that alone.
struct MaskedCopy {
  int64_t offset = 0, pitch = 0;  ///< bytes into the workspace; pitch 0: no copy, no mask
};

struct LinearBackwardPlan {
  LaunchShape launch;
  GradientSource to_feature[kMaxModalities], to_weight[kMaxModalities];
  int plane_count = 0;  ///< of a backward launch; those of a step are in its StepPlan
  GradientPlane planes[2 * kMaxModalities];
  int64_t plane_rows = 0;    ///< of the planes and of the masked copies
  int64_t plane_offset = 0;  ///< bytes into the workspace
  MaskedCopy masked[kMaxModalities];
  bool has_masked = false;
  int row_splits = 1;     ///< of the sums over rows (weights, biases)
  bool partials = false;  ///< these sums go to the workspace first; one more sync to add the splits
  int64_t rows_per_split = 0;
  int64_t padded_classes = 0;
  int bias_splits = 1;  ///< of the biases' sums, where they go to the workspace first
  int bias_plane[kMaxModalities + 1] = {};  ///< in a step: what the bias gradients are sums of
  int64_t weight_partial_offset = 0, bias_partial_offset = 0;  ///< bytes into the workspace
  int64_t weight_partial_columns = 0;
  TileGrid weight[kMaxModalities], feature[kMaxModalities];
  int64_t weight_tiles = 0, bias_tiles = 0;  ///< of one row split
  /// Work items by kind: each kind ends where the next begins.
  int64_t weight_end = 0, feature_end = 0, bias_end = 0;
};

struct FilmForwardPlan {
  LaunchShape launch;
  int64_t film_splits = 1, film_depth = 0;  ///< k-splits of [gamma|beta] and elements per split
  int64_t head_splits = 1, head_depth = 0;  ///< of the logits; 1: written without another sync
  int64_t plane_rows = 0;                   ///< of what the workspace holds
  int64_t padded_hidden = 0, padded_classes = 0;
  int64_t features_offset = 0, head_partial_offset = 0;  ///< bytes into the workspace
  TileGrid film, head;  ///< of gamma or beta, and of one branch's logits
};

struct FilmBackwardPlan {
  LaunchShape launch;
  bool need_branch[3] = {};    ///< d[k] = g_k W_o is computed (0 fused, 1 x alone, 2 y alone)
  bool to_out_weight[3] = {};  ///< g_k takes part in grad_out_weight
  /// Branches that take part in grad_out_weight have the first slots: their planes follow each
  /// other, so that their products are one GEMM with k = out_branches * rows.
  int slot[3] = {}, out_branches = 0;
  /// Incoming gradients are first copied to planes by slot: for that, or to be aligned.
  bool copy_gradients = false;
  bool condition_leak = false;  ///< grad_condition has a gamma part too
  /// In a step: residuals are weighted, since a leak is open; the forward phases' hidden features
  /// serve the gradients too.
  bool weighted = false, features_ready = false;
  int64_t plane_rows = 0;  ///< of what the workspace holds
  MaskedCopy masked;       ///< of x
  int64_t padded_hidden = 0, padded_classes = 0, padded_condition = 0;
  int64_t encoder_pitch = 0;  ///< row pitch of the encoder's gradient of the modulation
  /// The sums over rows (weights, biases) in pieces; > 1: one more sync. The branches' rows follow
  /// each other in grad_out_weight, whose pieces are therefore its own.
  int row_splits = 1, out_splits = 1;
  int bias_splits = 1;  ///< of the biases' sums, where they go to the workspace first
  bool partials = false, out_partials = false;  ///< these sums go to the workspace first
  int64_t rows_per_split = 0, out_rows_per_split = 0;
  /// bytes into the workspace: copies, features h.., d.., gradients of the modulation
  int64_t gradients_offset = 0, features_offset = 0, branches_offset = 0, parameters_offset = 0,
          encoder_offset = 0;
  int64_t film_weight_partial_offset = 0, out_weight_partial_offset = 0, bias_partial_offset = 0;
  TileGrid out_weight, branch, film_weight, condition;  ///< film_weight: of each half
  /// Work items of the head phase and of the film phase, by kind: each kind ends where the next
  /// begins.
  int64_t out_weight_end = 0, branch_end = 0, head_end = 0;
  int64_t film_weight_end = 0, condition_end = 0, film_end = 0;
};

/// What the steps of all heads share. Rows run in chunks, one after the other inside the launch, so
/// that what the workspace holds per row stays within the limit.
struct StepPlan {
  int branches = 0;        ///< with the fused one
  bool gradients = false;  ///< any wanted; else losses only
  bool mixed = false;      ///< planes hold weighted residuals: a leak is open
  bool weighted = false;   ///< rows weigh differently in means and gradients
  int64_t chunk_rows = 0;
  int chunks = 1;  ///< at least one, though it be empty: results are written there
  /// Residuals need the counts of all rows: rows have weights, or planes mix branches whose means
  /// divide by different numbers.
  bool needs_counts = false;
  int counting_ctas = 1;     ///< CTAs that count rows; each leaves its number
  bool count_first = false;  ///< library: rows are counted by a launch of its own
  int plane_count = 0;
  GradientPlane planes[2 * kMaxModalities + 1];
  int64_t padded_classes = 0;
  /// Bytes into the workspace: planes; per CTA, counted rows and sums of losses; totals of a
  /// launch.
  int64_t plane_offset = 0, counts_offset = 0, losses_offset = 0, totals_offset = 0;
};

/// What the workspace holds of one branch: of a CTA's rows, and of all rows. Behind the branches'
/// totals stand two more, whose scales are 1 and 0.
struct StepSums {
  double loss;
  int64_t correct;
};
struct StepCount {
  int64_t rows;    ///< that count
  double divisor;  ///< the sum of their weights
};
struct StepTotals {
  StepCount count;
  double scale;   ///< of the branch's planes in the gradients
  float scale32;  ///< the same, for products that take it from memory
};

struct LinearStepPlan {
  LaunchShape launch;
  StepPlan step;
  LinearForwardPlan forward;
  LinearBackwardPlan backward;
};

struct FilmStepPlan {
  LaunchShape launch;
  StepPlan step;
  FilmForwardPlan forward;
  FilmBackwardPlan backward;
  int64_t modulation_offset = 0;  ///< bytes into the workspace: [gamma|beta] of a chunk
};

/// What a caller, a test or a benchmark may ask of a plan. A tile that cannot do it is replaced by
/// one that can: unaligned operands always run on the small tile of their dtype.
struct PlanRequest {
  std::optional<Executor> executor;
  std::optional<Tile> tile;
  int64_t splits = 0;  ///< 0: the plan's choice; else about so many splits of k (or of the rows)
};

/// Bytes that a step keeps of logits and residuals at a time, and how many rows a chunk has at
/// least. The caller's figure always wins; 0 asks for the default.
struct WorkspaceLimit {
  int64_t bytes = kDefaultWorkspace, least_rows = 0;
};
inline WorkspaceLimit workspace_limit(int64_t bytes) {
  return bytes > 0 ? WorkspaceLimit{bytes, 0} : WorkspaceLimit{kDefaultWorkspace, kLeastChunkRows};
}

LinearForwardPlan plan_linear_forward(const LinearHeadForward&, Precision, const Device&,
                                      const PlanRequest& = {});
LinearBackwardPlan plan_linear_backward(const LinearHeadBackward&, Precision, const Device&,
                                        const PlanRequest& = {});
/// The limit is on what logits, planes and split sums take at a time; at least one tile of rows is
/// always there.
LinearStepPlan plan_linear_step(const LinearHeadStep&, Precision, const Device&, WorkspaceLimit,
                                const PlanRequest& = {});
FilmForwardPlan plan_film_forward(const FilmHeadForward&, Precision, const Device&,
                                  const PlanRequest& = {});
FilmBackwardPlan plan_film_backward(const FilmHeadBackward&, Precision, const Device&,
                                    const PlanRequest& = {});
FilmStepPlan plan_film_step(const FilmHeadStep&, Precision, const Device&, WorkspaceLimit,
                            const PlanRequest& = {});

}  // namespace dgl_ext
