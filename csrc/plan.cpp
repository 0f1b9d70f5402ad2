#include "plan.h"

#include <algorithm>

namespace dgl_ext {
namespace {

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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

bool allows_16_byte_copies(const void* data, int64_t stride, Dtype dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_size(dtype) % 16 == 0;
}
bool allows_16_byte_copies(const ConstMatrix& m, Dtype dtype) {
  return allows_16_byte_copies(m.data, m.stride, dtype);
}
/// Columns of a workspace plane whose rows are 16-byte multiples, for elements down to 16 bits.
int64_t padded(int64_t columns) { return round_up(columns, 8); }

struct TileFamily {
  Tile small, large, xlarge;
};
TileFamily family_of(Precision precision) {
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
int64_t count_tiles(Tile tile, const Output* outputs, int count) {
  int64_t tiles = 0;
  for (int i = 0; i < count; ++i) {
    tiles += ceil_div(outputs[i].rows, shape_of(tile).rows) *
             ceil_div(outputs[i].columns, shape_of(tile).columns);
  }
  return tiles;
}

/// Tile, alignment and path for a launch that computes `outputs` with GEMMs.
LaunchShape choose_tile(Precision precision, bool operands_aligned, bool has_xlarge, double flop,
                        const Output* outputs, int count, const Device& device,
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
int choose_grid(const LaunchShape& launch, int64_t items, const Device& device) {
  int64_t limit = int64_t(device.resident_ctas[static_cast<int>(launch.tile)]) *
                  std::max(device.multiprocessors, 1);
  if (device.max_ctas > 0) limit = std::min<int64_t>(limit, device.max_ctas);
  return int(std::max<int64_t>(1, std::min(items, limit)));
}
/// CTAs that an element-wise phase, a warp per row, can use; one per multiprocessor is enough.
int64_t row_items(int64_t rows, const LaunchShape& launch, const Device& device) {
  const int64_t warps = shape_of(launch.tile).threads() / 32;
  return std::min<int64_t>(ceil_div(rows, warps), device.multiprocessors);
}

/// Splits k so that about `target` items exist; returns the elements per split.
int64_t choose_depth(int64_t total_steps, int64_t splits, int64_t step) {
  total_steps = std::max<int64_t>(total_steps, 1);
  return ceil_div(total_steps, std::clamp<int64_t>(splits, 1, total_steps)) * step;
}

/// Splits of a sum over rows of `steps`, in a phase of `total` steps: no tile must take much longer
/// than an even share of the phase.
int64_t choose_row_splits(int64_t steps, int64_t total, const Device& device) {
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

int64_t total_width(const LinearHead& head) {
  int64_t sum = 0;
  for (int i = 0; i < head.modalities; ++i) sum += head.width[i];
  return sum;
}
/// Forward, feature and weight gradients: three products of two flop per multiply-add.
double work(const LinearHead& head) {
  return 6. * double(head.rows) * double(total_width(head)) * double(head.classes);
}
double work(const FilmHead& head) {
  const double film = 2. * double(head.condition_width) * double(head.hidden);
  return 6. * double(head.rows) * (film + 3. * double(head.hidden) * double(head.classes));
}
bool aligned(const LinearHead& head, Dtype dtype) {
  for (int i = 0; i < head.modalities; ++i) {
    if (!allows_16_byte_copies(head.feature[i], dtype) ||
        !allows_16_byte_copies(head.weight[i], dtype)) {
      return false;
    }
  }
  return true;
}
bool aligned(const FilmHead& head, Dtype dtype) {
  const ConstMatrix beta_weight{// the lower half of the film weight is an operand of its own
                                static_cast<const char*>(head.film_weight.data) +
                                    head.hidden * head.film_weight.stride * element_size(dtype),
                                head.film_weight.stride};
  return allows_16_byte_copies(head.condition, dtype) &&
         allows_16_byte_copies(head.film_weight, dtype) &&
         allows_16_byte_copies(beta_weight, dtype) && allows_16_byte_copies(head.out_weight, dtype);
}

int64_t width_steps(const LinearHead& head, int64_t depth) {
  int64_t steps = 0;
  for (int i = 0; i < head.modalities; ++i) steps += ceil_div(head.width[i], depth);
  return steps;
}
/// Splits every modality's width into pieces of equal depth; returns how many there are in all.
int64_t split_widths(const LinearHead& head, int64_t steps, int64_t wanted, int64_t depth,
                     LinearForwardPlan& plan) {
  plan.split_depth = choose_depth(steps, wanted, depth);
  int64_t splits = 0;
  for (int i = 0; i < head.modalities; ++i) {
    plan.splits[i] = ceil_div(head.width[i], plan.split_depth);
    splits += plan.splits[i];
  }
  return splits;
}

/// Columns of a masked copy, 0 where none is needed.
int64_t masked_columns(const uint8_t* present, const Matrix& grad_weight, int64_t width) {
  return present && grad_weight.data ? padded(width) : 0;
}
void mask_features(const LinearHead& head, const Matrix* grad_weight, Dtype dtype, Layout& layout,
                   LinearBackwardPlan& plan) {
  for (int i = 0; i < head.modalities; ++i) {
    const int64_t pitch = masked_columns(head.present[i], grad_weight[i], head.width[i]);
    if (pitch == 0) continue;
    plan.masked[i] = {layout.add(plan.plane_rows * pitch * element_size(dtype)), pitch};
    plan.has_masked = true;
  }
}
/// Split sums of the weight and bias gradients.
void place_partials(const LinearHead& head, Dtype dtype, Layout& layout, LinearBackwardPlan& plan) {
  plan.weight_partial_columns = 0;
  for (int i = 0; i < head.modalities; ++i) {
    plan.weight_partial_columns += round_up(head.width[i], 4);
  }
  const int64_t size = plan.row_splits * head.classes * accumulator_size(dtype);
  plan.weight_partial_offset = layout.add(plan.weight_partial_columns * size);
  plan.bias_partial_offset = layout.add((head.modalities + 1) * size);
}

/// Which GEMM operands the backward launch of the linear head uses, and the planes they need.
class SourceChooser {
 public:
  SourceChooser(const LinearHeadBackward& problem, Dtype dtype, LinearBackwardPlan& plan)
      : p_(problem), dtype_(dtype), plan_(plan) {}

  void choose() {
    for (int i = 0; i < p_.head.modalities; ++i) {
      if (p_.grad_feature[i].data && feature_flows(p_, i)) {
        plan_.to_feature[i] = source(i + 1, 0, p_.leaks.encoder);
      }
      if (p_.grad_weight[i].data && weight_flows(p_, i)) {
        plan_.to_weight[i] = source(0, i + 1, p_.leaks.head);
      }
    }
  }

 private:
  const ConstMatrix& gradient(int index) const {
    return index == 0 ? p_.grad_fused : p_.grad_unimodal[index - 1];
  }
  /// gradient[main] + leak * gradient[other], one of which may be missing.
  GradientSource source(int main, int other, double leak) {
    if (!gradient(other).data) leak = 0;
    if (gradient(main).data && leak != 0) return {-1, plane({main, other, leak}), 1};
    const int only = gradient(main).data ? main : other;
    const double scale = only == main ? 1 : leak;
    if (plan_.launch.aligned && !allows_16_byte_copies(gradient(only), dtype_)) {
      return {-1, plane({only, -1, 0}), scale};
    }
    return {only, -1, scale};
  }
  int plane(const GradientPlane& wanted) {
    for (int i = 0; i < plan_.plane_count; ++i) {
      const GradientPlane& have = plan_.planes[i];
      if (have.first == wanted.first && have.second == wanted.second) return i;
    }
    plan_.planes[plan_.plane_count] = wanted;
    return plan_.plane_count++;
  }

  const LinearHeadBackward& p_;
  const Dtype dtype_;
  LinearBackwardPlan& plan_;
};

}  // namespace

LinearForwardPlan plan_linear_forward(const LinearHeadForward& p, Precision precision,
                                      const Device& device, const PlanRequest& request) {
  const LinearHead& head = p.head;
  LinearForwardPlan plan;
  const Output output{head.rows, head.classes * head.modalities};
  plan.launch = choose_tile(precision, aligned(head, precision.dtype), true, work(head), &output, 1,
                            device, request);
  const TileShape& shape = shape_of(plan.launch.tile);
  const Output logits{head.rows, head.classes};
  const int64_t tiles = count_tiles(plan.launch.tile, &logits, 1);
  const int64_t steps = width_steps(head, shape.depth);
  plan.plane_rows = head.rows;
  plan.padded_classes = padded(head.classes);
  const int64_t plane = head.rows * plan.padded_classes * accumulator_size(precision.dtype);
  const bool enough_tiles = 2 * tiles >= device.multiprocessors;
  plan.direct = request.splits > 0 ? request.splits == 1 : enough_tiles || steps <= kDirectSteps;
  if (plan.direct) {
    plan.launch.workspace_bytes = head.modalities > 1 ? plane : 0;
    plan.launch.grid = choose_grid(plan.launch, tiles, device);
    return plan;
  }
  const int64_t wanted =
      request.splits > 0 ? request.splits : device.multiprocessors / std::max<int64_t>(tiles, 1);
  const int64_t splits = split_widths(head, steps, wanted, shape.depth, plan);
  plan.launch.cooperative = true;
  plan.launch.workspace_bytes = splits * plane;
  const int64_t items = std::max(splits * tiles, row_items(head.rows, plan.launch, device));
  plan.launch.grid = choose_grid(plan.launch, items, device);
  return plan;
}

LinearBackwardPlan plan_linear_backward(const LinearHeadBackward& p, Precision precision,
                                        const Device& device, const PlanRequest& request) {
  const LinearHead& head = p.head;
  LinearBackwardPlan plan;
  Output outputs[2 * kMaxModalities];
  int weights = 0, count = 0;
  for (int i = 0; i < head.modalities; ++i) {
    if (p.grad_weight[i].data) outputs[count++] = {head.classes, head.width[i]};
  }
  weights = count;
  for (int i = 0; i < head.modalities; ++i) {
    if (p.grad_feature[i].data) outputs[count++] = {head.rows, head.width[i]};
  }
  plan.launch = choose_tile(precision, aligned(head, precision.dtype), true, work(head), outputs,
                            count, device, request);
  SourceChooser(p, precision.dtype, plan).choose();

  const Tile tile = plan.launch.tile;
  const int64_t depth = shape_of(tile).depth, steps = ceil_div(head.rows, depth);
  const int64_t weight_tiles = count_tiles(tile, outputs, weights);
  const int64_t feature_tiles = count_tiles(tile, outputs + weights, count - weights);
  int64_t wanted = request.splits;
  if (wanted == 0) {
    const int64_t total = weight_tiles * steps + feature_tiles * ceil_div(head.classes, depth);
    wanted = choose_row_splits(steps, total, device);
  }
  plan.rows_per_split = choose_depth(steps, wanted, depth);
  plan.row_splits = int(std::max<int64_t>(1, ceil_div(head.rows, plan.rows_per_split)));

  int biases = p.grad_fused_bias != nullptr;
  for (int i = 0; i < head.modalities; ++i) biases += p.grad_branch_bias[i] != nullptr;
  plan.plane_rows = head.rows;
  plan.padded_classes = padded(head.classes);
  plan.partials = plan.row_splits > 1;
  Layout layout;
  plan.plane_offset = layout.add(plan.plane_count * head.rows * plan.padded_classes *
                                 element_size(precision.dtype));
  mask_features(head, p.grad_weight, precision.dtype, layout, plan);
  if (plan.partials) place_partials(head, precision.dtype, layout, plan);
  plan.launch.workspace_bytes = layout.bytes();
  plan.launch.cooperative = plan.plane_count > 0 || plan.has_masked || plan.partials;
  const int64_t bias_tiles = biases * ceil_div(head.classes, 32);
  int64_t items = (weight_tiles + bias_tiles) * plan.row_splits + feature_tiles;
  if (plan.plane_count > 0 || plan.has_masked)
    items = std::max(items, row_items(head.rows, plan.launch, device));
  plan.launch.grid = choose_grid(plan.launch, items, device);
  return plan;
}

namespace {

/// Which planes the step of the linear head needs.
class StepPlanes {
 public:
  StepPlanes(const LinearHeadStep& problem, LinearStepPlan& plan) : p_(problem), plan_(plan) {}

  void choose() {
    const int count = p_.head.modalities;
    for (int i = 0; i < count; ++i) {
      const bool features = p_.grad_feature[i].data, weights = weights_wanted(i);
      plan_.step.gradients |= features || weights;
      plan_.step.mixed |= features && p_.leaks.encoder != 0;
      plan_.step.mixed |= weights && p_.leaks.head != 0;
    }
    plan_.step.gradients |= p_.grad_fused_bias != nullptr;
    plan_.step.mixed |= p_.grad_fused_bias && p_.leaks.head != 0;
    for (int i = 0; i < count; ++i) {
      if (p_.grad_feature[i].data) {
        const int branch = plan_.step.mixed ? 0 : i + 1;
        plan_.backward.to_feature[i] = {branch, plane(i + 1, 0, 1, p_.leaks.encoder), 1};
      }
      if (weights_wanted(i)) {
        const int index = plane(0, i + 1, i + 2, p_.leaks.head);
        plan_.backward.to_weight[i] = {0, index, 1};
        plan_.backward.bias_plane[i + 1] = index;
      }
    }
    if (p_.grad_fused_bias) {
      plan_.backward.bias_plane[0] = plane(0, 1, count + 1, p_.leaks.head);
    }
  }

 private:
  bool weights_wanted(int i) const { return p_.grad_weight[i].data || p_.grad_branch_bias[i]; }
  int plane(int first, int begin, int end, double leak) {
    if (leak == 0) begin = end = 0;
    StepPlan& step = plan_.step;
    for (int i = 0; i < step.plane_count; ++i) {
      const StepPlane& have = step.planes[i];
      if (have.first == first && have.begin == begin && have.end == end) return i;
    }
    step.planes[step.plane_count] = {first, begin, end, leak};
    return step.plane_count++;
  }

  const LinearHeadStep& p_;
  LinearStepPlan& plan_;
};

/// Rows that a step works on at a time: all, or as many tiles of rows as fit, evenly.
int64_t choose_chunk(int64_t rows, int64_t row_bytes, int64_t limit, int64_t tile_rows) {
  const int64_t fit = std::max<int64_t>(limit, 0) / std::max<int64_t>(row_bytes, 1);
  if (fit >= rows) return std::max<int64_t>(rows, 1);
  const int64_t chunks = ceil_div(rows, std::max(fit / tile_rows * tile_rows, tile_rows));
  return round_up(ceil_div(rows, chunks), tile_rows);
}
/// What CTAs tell each other, behind everything else in the workspace.
void place_sums(int grid, Layout& layout, StepPlan& plan) {
  const int64_t branches = plan.branches;
  plan.counts_offset = layout.add(grid * branches * int64_t(sizeof(int64_t)));
  plan.losses_offset = layout.add(grid * branches * int64_t(sizeof(StepSums)));
  plan.totals_offset = layout.add(branches * int64_t(sizeof(StepTotals)));
}

}  // namespace

LinearStepPlan plan_linear_step(const LinearHeadStep& p, Precision precision, const Device& device,
                                int64_t workspace_limit, const PlanRequest& request) {
  const LinearHead& head = p.head;
  const Dtype dtype = precision.dtype;
  LinearStepPlan plan;
  StepPlan& step = plan.step;
  LinearBackwardPlan& backward = plan.backward;
  step.branches = head.modalities + 1;
  step.padded_classes = plan.forward.padded_classes = backward.padded_classes =
      padded(head.classes);
  StepPlanes(p, plan).choose();

  Output weights[kMaxModalities];
  int64_t masked = 0;
  int weight_count = 0, biases = p.grad_fused_bias != nullptr;
  for (int i = 0; i < head.modalities; ++i) {
    if (p.grad_weight[i].data) weights[weight_count++] = {head.classes, head.width[i]};
    biases += p.grad_branch_bias[i] != nullptr;
    masked += masked_columns(head.present[i], p.grad_weight[i], head.width[i]);
  }
  const Output all_logits{head.rows, head.classes * head.modalities};
  plan.launch = choose_tile(precision, aligned(head, dtype), false, work(head), &all_logits, 1,
                            device, request);
  plan.launch.cooperative = true;
  const TileShape& shape = shape_of(plan.launch.tile);

  // a quarter of the workspace is for split sums of weights, the rest for what there is per row
  const int64_t row_limit = workspace_limit - workspace_limit / 4;
  const auto row_bytes = [&](int64_t splits) {
    return step.padded_classes *
               (splits * accumulator_size(dtype) + step.plane_count * element_size(dtype)) +
           masked * element_size(dtype);
  };
  const int64_t rows = choose_chunk(head.rows, row_bytes(head.modalities), row_limit, shape.rows);
  step.chunk_rows = plan.forward.plane_rows = backward.plane_rows = rows;
  const bool chunked = rows < head.rows;

  const Output logits{rows, head.classes};
  const int64_t tiles = count_tiles(plan.launch.tile, &logits, 1);
  const int64_t steps = width_steps(head, shape.depth);
  int64_t wanted =
      request.splits > 0 ? request.splits : device.multiprocessors / std::max<int64_t>(tiles, 1);
  wanted = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(steps, 1));
  plan.forward.direct = false;
  int64_t splits = split_widths(head, steps, wanted, shape.depth, plan.forward);
  while (wanted > 1 && row_bytes(splits) * rows > row_limit) {
    splits = split_widths(head, steps, --wanted, shape.depth, plan.forward);
  }

  const int64_t row_steps = ceil_div(rows, shape.depth);
  const int64_t weight_tiles = count_tiles(plan.launch.tile, weights, weight_count);
  int64_t feature_tiles = 0;
  for (int i = 0; i < head.modalities; ++i) {
    const Output feature{p.grad_feature[i].data ? rows : 0, head.width[i]};
    feature_tiles += count_tiles(plan.launch.tile, &feature, 1);
  }
  int64_t row_splits = request.splits;
  if (row_splits == 0) {
    row_splits = choose_row_splits(
        row_steps, weight_tiles * row_steps + feature_tiles * ceil_div(head.classes, shape.depth),
        device);
  }
  const int64_t sums = head.classes * (total_width(head) + step.branches) * accumulator_size(dtype);
  if (row_splits * sums > workspace_limit / 4) {
    row_splits = std::max<int64_t>(1, workspace_limit / 4 / std::max<int64_t>(sums, 1));
  }
  backward.rows_per_split = choose_depth(row_steps, row_splits, shape.depth);
  backward.row_splits = int(std::max<int64_t>(1, ceil_div(rows, backward.rows_per_split)));
  // chunks add up in the accumulator type: in the output itself unless that is narrower
  backward.partials = backward.row_splits > 1 || (chunked && dtype == Dtype::kBFloat16);

  Layout layout;
  layout.add(splits * rows * step.padded_classes * accumulator_size(dtype));
  step.plane_offset = backward.plane_offset =
      layout.add(step.plane_count * rows * step.padded_classes * element_size(dtype));
  mask_features(head, p.grad_weight, dtype, layout, backward);
  if (backward.partials) place_partials(head, dtype, layout, backward);
  const int64_t warp_rows = rows * (step.mixed ? 1 : step.branches);
  const int64_t items = std::max(
      {splits * tiles, row_items(warp_rows, plan.launch, device),
       (weight_tiles + biases * ceil_div(head.classes, 32)) * backward.row_splits + feature_tiles});
  plan.launch.grid = choose_grid(plan.launch, items, device);
  place_sums(plan.launch.grid, layout, step);
  plan.launch.workspace_bytes = layout.bytes();
  return plan;
}

namespace {

/// Splits and workspace of the forward phases; returns the work items of the largest.
int64_t size_film_forward(const FilmHead& head, Dtype dtype, const LaunchShape& launch,
                          bool in_step, const Device& device, const PlanRequest& request,
                          Layout& layout, FilmForwardPlan& plan) {
  const int64_t depth = shape_of(launch.tile).depth;
  const Output film{head.rows, head.hidden}, logits{head.rows, head.classes};
  const int64_t film_tiles = 2 * count_tiles(launch.tile, &film, 1);
  const int64_t head_tiles = 3 * count_tiles(launch.tile, &logits, 1);
  const auto wanted = [&](int64_t tiles) {
    if (request.splits > 0) return request.splits;
    return device.multiprocessors / std::max<int64_t>(tiles, 1);
  };
  plan.film_depth = choose_depth(ceil_div(head.condition_width, depth), wanted(film_tiles), depth);
  plan.film_splits = std::max<int64_t>(1, ceil_div(head.condition_width, plan.film_depth));
  const int64_t head_steps = ceil_div(head.hidden, depth);
  // a step has the sync before its logits in any case
  const bool split_head = in_step || request.splits > 1 || head_steps > kDirectSteps;
  plan.head_depth = choose_depth(head_steps, split_head ? wanted(head_tiles) : 1, depth);
  plan.head_splits = std::max<int64_t>(1, ceil_div(head.hidden, plan.head_depth));

  plan.plane_rows = head.rows;
  plan.padded_hidden = padded(head.hidden);
  plan.padded_classes = padded(head.classes);
  const int64_t size = accumulator_size(dtype);
  layout.add(plan.film_splits * head.rows * 2 * plan.padded_hidden * size);
  plan.features_offset = layout.add(3 * head.rows * plan.padded_hidden * element_size(dtype));
  if (in_step || plan.head_splits > 1) {
    plan.head_partial_offset =
        layout.add(plan.head_splits * 3 * head.rows * plan.padded_classes * size);
  }
  return std::max({film_tiles * plan.film_splits, head_tiles * plan.head_splits,
                   row_items(head.rows, launch, device)});
}

}  // namespace

FilmForwardPlan plan_film_forward(const FilmHeadForward& p, Precision precision,
                                  const Device& device, const PlanRequest& request) {
  const FilmHead& head = p.head;
  FilmForwardPlan plan;
  const Output outputs[] = {{head.rows, 2 * head.hidden}, {3 * head.rows, head.classes}};
  plan.launch = choose_tile(precision, aligned(head, precision.dtype), false, work(head), outputs,
                            2, device, request);
  Layout layout;
  const int64_t items =
      size_film_forward(head, precision.dtype, plan.launch, false, device, request, layout, plan);
  plan.launch.workspace_bytes = layout.bytes();
  plan.launch.cooperative = true;
  plan.launch.grid = choose_grid(plan.launch, items, device);
  return plan;
}

namespace {

/// What the backward phases compute.
struct FilmOutputs {
  Output branch, out_weight, film_weight, condition;
};

/// Which branches are needed for what, and in which order their planes stand. Returns whether the
/// incoming gradients allow 16-byte copies.
bool choose_film_branches(const FilmHeadBackward& p, Dtype dtype, FilmBackwardPlan& plan,
                          FilmOutputs& outputs) {
  const FilmHead& head = p.head;
  const bool features = p.grad_condition.data || p.grad_target.data;
  const bool film = p.grad_film_weight.data || p.grad_film_bias;
  const bool leak = p.leaks.head != 0;
  const ConstMatrix* incoming[3] = {&p.grad_fused, &p.grad_unimodal[0], &p.grad_unimodal[1]};
  const bool needed[3] = {film || (p.leaks.encoder != 0 && features),
                          p.grad_condition.data || (leak && film),
                          p.grad_target.data || (leak && p.grad_film_bias)};
  bool gradients_aligned = true;
  int branches = 0;
  plan.out_branches = 0;
  for (int k = 0; k < 3; ++k) {
    if (!incoming[k]->data) continue;
    plan.need_branch[k] = needed[k];
    plan.to_out_weight[k] = p.grad_out_weight.data && (k == 0 || leak);
    branches += needed[k];
    plan.out_branches += plan.to_out_weight[k];
    gradients_aligned &= allows_16_byte_copies(*incoming[k], dtype);
  }
  for (int k = 0, out = 0, other = plan.out_branches; k < 3; ++k) {
    plan.slot[k] = plan.to_out_weight[k] ? out++ : other++;
  }
  plan.condition_leak = p.grad_condition.data && p.grad_fused.data && p.leaks.encoder != 0;

  outputs.branch = {branches * head.rows, head.hidden};
  outputs.film_weight = {p.grad_film_weight.data ? 2 * head.hidden : 0, head.condition_width};
  outputs.condition = {p.grad_condition.data ? head.rows : 0, head.condition_width};
  outputs.out_weight = {p.grad_out_weight.data ? head.classes : 0, head.hidden};
  return gradients_aligned;
}

/// Splits and workspace of the backward phases; returns the work items of the largest. In a step
/// the planes of the gradients lie elsewhere, and all sums over rows may have to be kept in the
/// workspace (`keep_sums`).
int64_t size_film_backward(const FilmHeadBackward& p, Dtype dtype, const LaunchShape& launch,
                           const FilmOutputs& outputs, bool keep_sums, const Device& device,
                           const PlanRequest& request, Layout& layout, FilmBackwardPlan& plan) {
  const FilmHead& head = p.head;
  plan.plane_rows = head.rows;
  plan.padded_hidden = padded(head.hidden);
  plan.padded_classes = padded(head.classes);
  const int64_t size = element_size(dtype);
  const int64_t hidden_plane = head.rows * plan.padded_hidden;
  if (plan.copy_gradients) {
    plan.gradients_offset = layout.add(3 * head.rows * plan.padded_classes * size);
  }
  if (!plan.features_ready) {
    plan.features_offset = layout.add(plan.out_branches * hidden_plane * size);
  }
  plan.branches_offset = layout.add(3 * hidden_plane * accumulator_size(dtype));
  plan.parameters_offset = layout.add(2 * hidden_plane * size);
  plan.encoder_pitch = padded(plan.condition_leak ? 2 * head.hidden : head.hidden);
  plan.encoder_offset = layout.add(head.rows * plan.encoder_pitch * size);
  const int64_t pitch = masked_columns(head.present[0], p.grad_film_weight, head.condition_width);
  if (pitch > 0) plan.masked = {layout.add(head.rows * pitch * size), pitch};

  const Tile tile = launch.tile;
  const int64_t depth = shape_of(tile).depth, steps = ceil_div(head.rows, depth);
  const int64_t out_rows = plan.out_branches * head.rows, out_steps = ceil_div(out_rows, depth);
  const int64_t branch_tiles = count_tiles(tile, &outputs.branch, 1);
  const int64_t out_tiles = count_tiles(tile, &outputs.out_weight, 1);
  // each half of the film weight has tiles of its own
  const Output half{outputs.film_weight.rows / 2, outputs.film_weight.columns};
  const int64_t film_tiles = 2 * count_tiles(tile, &half, 1);
  const int64_t condition_tiles = count_tiles(tile, &outputs.condition, 1);
  const int64_t condition_steps = ceil_div((plan.condition_leak ? 2 : 1) * head.hidden, depth);
  int64_t wanted = request.splits, out_wanted = request.splits;
  if (wanted == 0) {
    out_wanted = choose_row_splits(
        out_steps, out_tiles * out_steps + branch_tiles * ceil_div(head.classes, depth), device);
    wanted =
        choose_row_splits(steps, film_tiles * steps + condition_tiles * condition_steps, device);
  }
  plan.rows_per_split = choose_depth(steps, wanted, depth);
  plan.row_splits = int(std::max<int64_t>(1, ceil_div(head.rows, plan.rows_per_split)));
  plan.out_rows_per_split = choose_depth(out_steps, out_wanted, depth);
  plan.out_splits = int(std::max<int64_t>(1, ceil_div(out_rows, plan.out_rows_per_split)));
  const int64_t partial = accumulator_size(dtype);
  plan.partials = keep_sums || plan.row_splits > 1;
  plan.out_partials = keep_sums || plan.out_splits > 1;
  if (plan.out_partials) {
    plan.out_weight_partial_offset =
        layout.add(plan.out_splits * head.classes * plan.padded_hidden * partial);
  }
  if (plan.partials) {
    if (p.grad_film_weight.data) {
      plan.film_weight_partial_offset =
          layout.add(plan.row_splits * 2 * head.hidden * padded(head.condition_width) * partial);
    }
    plan.bias_partial_offset =
        layout.add(plan.row_splits * (head.classes + 2 * head.hidden) * partial);
  }
  const int64_t first =
      branch_tiles + out_tiles * plan.out_splits + ceil_div(head.classes, 32) * plan.row_splits;
  const int64_t second =
      condition_tiles + (film_tiles + 2 * ceil_div(head.hidden, 32)) * plan.row_splits;
  return std::max({first, second, row_items(head.rows, launch, device)});
}

}  // namespace

FilmBackwardPlan plan_film_backward(const FilmHeadBackward& p, Precision precision,
                                    const Device& device, const PlanRequest& request) {
  FilmBackwardPlan plan;
  FilmOutputs outputs;
  const bool gradients_aligned = choose_film_branches(p, precision.dtype, plan, outputs);
  const Output all[] = {outputs.branch, outputs.out_weight, outputs.film_weight, outputs.condition};
  plan.launch = choose_tile(precision, aligned(p.head, precision.dtype), false, work(p.head), all,
                            4, device, request);
  plan.copy_gradients = plan.out_branches > 1 || (plan.launch.aligned && !gradients_aligned);
  Layout layout;
  const int64_t items = size_film_backward(p, precision.dtype, plan.launch, outputs, false, device,
                                           request, layout, plan);
  plan.launch.workspace_bytes = layout.bytes();
  plan.launch.cooperative = true;
  plan.launch.grid = choose_grid(plan.launch, items, device);
  return plan;
}

namespace {

/// The step of one chunk of `rows` with the launch's tile; the whole plan but for its grid.
int64_t size_film_step(FilmHeadBackward p, Dtype dtype, int64_t rows, bool keep_sums,
                       const Device& device, const PlanRequest& request, Layout& layout,
                       FilmStepPlan& plan) {
  p.head.rows = rows;
  StepPlan& step = plan.step;
  FilmBackwardPlan& backward = plan.backward;
  int64_t items =
      size_film_forward(p.head, dtype, plan.launch, true, device, request, layout, plan.forward);
  step.chunk_rows = rows;
  step.padded_classes = padded(p.head.classes);
  plan.modulation_offset = layout.add(rows * 2 * p.head.hidden * accumulator_size(dtype));
  step.plane_offset =
      layout.add(step.plane_count * rows * step.padded_classes * element_size(dtype));
  if (!step.gradients) return items;
  FilmOutputs outputs;
  choose_film_branches(p, dtype, backward, outputs);
  backward.weighted = step.mixed;
  backward.features_ready = p.leaks.head == 0;
  backward.features_offset = plan.forward.features_offset;
  items = std::max(items, size_film_backward(p, dtype, plan.launch, outputs, keep_sums, device,
                                             request, layout, backward));
  backward.gradients_offset = step.plane_offset;
  return items;
}

}  // namespace

FilmStepPlan plan_film_step(const FilmHeadStep& p, Precision precision, const Device& device,
                            int64_t workspace_limit, const PlanRequest& request) {
  const FilmHead& head = p.head;
  const Dtype dtype = precision.dtype;
  FilmHeadBackward b;
  b.head = head;
  b.leaks = p.leaks;
  b.grad_condition = p.grad_condition;
  b.grad_target = p.grad_target;
  b.grad_film_weight = p.grad_film_weight;
  b.grad_out_weight = p.grad_out_weight;
  b.grad_film_bias = p.grad_film_bias;
  b.grad_out_bias = p.grad_out_bias;
  // every branch has a gradient; plans ask no more than whether it is there
  b.grad_fused = b.grad_unimodal[0] = b.grad_unimodal[1] = {&p, 0};

  FilmStepPlan plan;
  StepPlan& step = plan.step;
  step.branches = 3;
  const bool features = p.grad_condition.data || p.grad_target.data;
  const bool parameters =
      p.grad_film_weight.data || p.grad_out_weight.data || p.grad_film_bias || p.grad_out_bias;
  step.gradients = features || parameters;
  step.mixed = (features && p.leaks.encoder != 0) || (parameters && p.leaks.head != 0);
  FilmOutputs outputs;
  choose_film_branches(b, dtype, plan.backward, outputs);
  const Output all[] = {{head.rows, 2 * head.hidden}, {3 * head.rows, head.classes}};
  plan.launch =
      choose_tile(precision, aligned(head, dtype), false, work(head), all, 2, device, request);
  plan.launch.cooperative = true;
  if (step.gradients) {
    step.plane_count = 3;
    for (int k = 0; k < 3; ++k) step.planes[plan.backward.slot[k]] = {k, 0, 0, 0};
  }

  // all rows, with splits, without, or as many tiles of rows as fit
  const int64_t tile_rows = shape_of(plan.launch.tile).rows;
  PlanRequest unsplit = request;
  if (unsplit.splits == 0) unsplit.splits = 1;
  const auto bytes = [&](int64_t rows, const PlanRequest& with) {
    FilmStepPlan trial = plan;
    Layout layout;
    size_film_step(b, dtype, rows, false, device, with, layout, trial);
    return layout.bytes();
  };
  const PlanRequest* with = &request;
  int64_t rows = std::max<int64_t>(head.rows, 1);
  if (bytes(rows, request) > workspace_limit) {
    with = &unsplit;
    const int64_t one = bytes(tile_rows, unsplit),
                  row_bytes = (bytes(2 * tile_rows, unsplit) - one) / tile_rows;
    const int64_t fixed = one - tile_rows * row_bytes;
    rows = choose_chunk(head.rows, row_bytes, workspace_limit - fixed, tile_rows);
  }
  const bool keep_sums = rows < head.rows && dtype == Dtype::kBFloat16;
  Layout layout;
  int64_t items = size_film_step(b, dtype, rows, keep_sums, device, *with, layout, plan);
  items = std::max(items, row_items(rows * (step.mixed ? 1 : 3), plan.launch, device));
  plan.launch.grid = choose_grid(plan.launch, items, device);
  place_sums(plan.launch.grid, layout, step);
  plan.launch.workspace_bytes = layout.bytes();
  return plan;
}

}  // namespace dgl_ext
