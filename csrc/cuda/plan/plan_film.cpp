// The plans of the FiLM head.
#include <algorithm>

#include "cuda/plan/plan.h"
#include "cuda/plan/planning.h"

namespace dgl_ext {

using namespace planning;

namespace {

double work(const FilmHead& head) {
  const double film = 2. * double(head.condition_width) * double(head.hidden);
  return 6. * double(head.rows) * (film + 3. * double(head.hidden) * double(head.classes));
}
/// The lower half of the film weight, an operand of its own, is as aligned as the whole.
bool aligned(const FilmHead& head, Dtype dtype) {
  return allows_16_byte_copies(head.condition, dtype) &&
         allows_16_byte_copies(head.film_weight, dtype) &&
         allows_16_byte_copies(head.out_weight, dtype);
}

/// Splits and workspace of the forward phases; returns the work items of the largest.
int64_t size_film_forward(const FilmHead& head, Dtype dtype, const LaunchShape& launch,
                          bool in_step, const Device& device, const PlanRequest& request,
                          Layout& layout, FilmForwardPlan& plan) {
  const int64_t depth = tile_shape(launch.tile).depth;
  const bool library = launch.executor == Executor::kLibrary;
  plan.film = tiles_of(launch.tile, head.rows, head.hidden);
  plan.head = tiles_of(launch.tile, head.rows, head.classes);
  const int64_t film_tiles = 2 * plan.film.count, head_tiles = 3 * plan.head.count;
  const auto wanted = [&](int64_t tiles) { return choose_splits(launch, tiles, device, request); };
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
  if (in_step || library || plan.head_splits > 1) {
    plan.head_partial_offset =
        layout.add(plan.head_splits * 3 * head.rows * plan.padded_classes * size);
  }
  return std::max(
      {film_tiles * plan.film_splits, head_tiles * plan.head_splits, row_items(head.rows, device)});
}

/// Rows that library's forward works on at a time.
int64_t forward_chunk(const FilmHead& head, Dtype dtype) {
  const int64_t hidden = padded(head.hidden), classes = padded(head.classes);
  const int64_t row =
      (2 * hidden + 3 * classes) * accumulator_size(dtype) + 3 * hidden * element_size(dtype);
  return choose_chunk(head.rows, row, kDefaultWorkspace, kLeastChunkRows, 32);
}

}  // namespace

FilmForwardPlan plan_film_forward(const FilmHeadForward& p, Precision precision,
                                  const Device& device, const PlanRequest& request) {
  const FilmHead& head = p.head;
  FilmForwardPlan plan;
  const OutputSize outputs[] = {{head.rows, 2 * head.hidden}, {3 * head.rows, head.classes}};
  plan.launch = choose_launch(precision, aligned(head, precision.dtype), work(head), outputs, 2,
                              device, request);
  Layout layout;
  FilmHead chunk = head;
  if (plan.launch.executor == Executor::kLibrary) chunk.rows = forward_chunk(head, precision.dtype);
  const int64_t items =
      size_film_forward(chunk, precision.dtype, plan.launch, false, device, request, layout, plan);
  plan.launch.workspace_bytes = layout.bytes();
  plan.launch.grid = choose_grid(plan.launch, items, device);
  return plan;
}

namespace {

int count_branches(const FilmBackwardPlan& plan) {
  return plan.need_branch[0] + plan.need_branch[1] + plan.need_branch[2];
}

/// Which branches are needed for what, and in which order their planes stand. Returns whether the
/// incoming gradients allow 16-byte copies.
bool choose_film_branches(const FilmHeadBackward& p, Dtype dtype, FilmBackwardPlan& plan) {
  const bool features = p.grad_condition.data || p.grad_target.data;
  const bool film = p.grad_film_weight.data || p.grad_film_bias;
  const bool leak = p.leaks.head != 0;
  const ConstMatrix* incoming[3] = {&p.grad_fused, &p.grad_unimodal[0], &p.grad_unimodal[1]};
  const bool needed[3] = {film || (p.leaks.encoder != 0 && features),
                          p.grad_condition.data || (leak && film),
                          p.grad_target.data || (leak && p.grad_film_bias)};
  bool gradients_aligned = true;
  plan.out_branches = 0;
  for (int k = 0; k < 3; ++k) {
    if (!incoming[k]->data) continue;
    plan.need_branch[k] = needed[k];
    plan.to_out_weight[k] = p.grad_out_weight.data && (k == 0 || leak);
    plan.out_branches += plan.to_out_weight[k];
    gradients_aligned &= allows_16_byte_copies(*incoming[k], dtype);
  }
  for (int k = 0, out = 0, other = plan.out_branches; k < 3; ++k) {
    plan.slot[k] = plan.to_out_weight[k] ? out++ : other++;
  }
  plan.condition_leak = p.grad_condition.data && p.grad_fused.data && p.leaks.encoder != 0;
  return gradients_aligned;
}

/// Splits and workspace of the backward phases; returns the work items of the largest. In a step
/// the planes of the gradients lie elsewhere, and all sums over rows may have to be kept in the
/// workspace (`keep_sums`).
int64_t size_film_backward(const FilmHeadBackward& p, Dtype dtype, const LaunchShape& launch,
                           bool keep_sums, const Device& device, const PlanRequest& request,
                           Layout& layout, FilmBackwardPlan& plan) {
  const FilmHead& head = p.head;
  plan.plane_rows = head.rows;
  plan.padded_hidden = padded(head.hidden);
  plan.padded_classes = padded(head.classes);
  plan.padded_condition = padded(head.condition_width);
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
  const int64_t pitch = copied_columns(head.present[0], p.grad_film_weight, head.condition_width);
  if (pitch > 0) plan.masked = {layout.add(head.rows * pitch * size), pitch};

  const Tile tile = launch.tile;
  const int64_t depth = tile_shape(tile).depth, steps = ceil_div(head.rows, depth);
  const int64_t out_rows = plan.out_branches * head.rows, out_steps = ceil_div(out_rows, depth);
  const auto tiles = [&](const Matrix& output, int64_t rows, int64_t columns) {
    return output.data ? tiles_of(tile, rows, columns) : TileGrid{};
  };
  plan.branch = tiles_of(tile, head.rows, head.hidden);
  plan.out_weight = tiles(p.grad_out_weight, head.classes, head.hidden);
  plan.film_weight = tiles(p.grad_film_weight, head.hidden, head.condition_width);
  plan.condition = tiles(p.grad_condition, head.rows, head.condition_width);
  const int64_t branch_tiles = count_branches(plan) * plan.branch.count;
  const int64_t condition_steps = ceil_div((plan.condition_leak ? 2 : 1) * head.hidden, depth);
  const bool library = launch.executor == Executor::kLibrary;
  int64_t wanted = library ? 1 : request.splits, out_wanted = wanted;
  if (wanted == 0) {
    const int64_t branch_steps = branch_tiles * ceil_div(head.classes, depth);
    out_wanted =
        choose_row_splits(out_steps, plan.out_weight.count * out_steps + branch_steps, device);
    wanted = choose_row_splits(
        steps, 2 * plan.film_weight.count * steps + plan.condition.count * condition_steps, device);
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
  plan.bias_splits = library ? element_grid(device) : plan.row_splits;
  if (plan.partials && p.grad_film_weight.data) {
    plan.film_weight_partial_offset =
        layout.add(plan.row_splits * 2 * head.hidden * plan.padded_condition * partial);
  }
  if (plan.partials || library) {
    plan.bias_partial_offset =
        layout.add(plan.bias_splits * (head.classes + 2 * head.hidden) * partial);
  }
  const auto bias_tiles = [&](const void* bias, int64_t columns) {
    return bias ? ceil_div(columns, kColumnTile) * plan.row_splits : 0;
  };
  plan.out_weight_end = plan.out_weight.count * plan.out_splits;
  plan.branch_end = plan.out_weight_end + branch_tiles;
  plan.head_end = plan.branch_end + bias_tiles(p.grad_out_bias, head.classes);
  plan.film_weight_end = 2 * plan.film_weight.count * plan.row_splits;
  plan.condition_end = plan.film_weight_end + plan.condition.count;
  plan.film_end = plan.condition_end + 2 * bias_tiles(p.grad_film_bias, head.hidden);
  return std::max({plan.head_end, plan.film_end, row_items(head.rows, device)});
}

}  // namespace

FilmBackwardPlan plan_film_backward(const FilmHeadBackward& p, Precision precision,
                                    const Device& device, const PlanRequest& request) {
  const FilmHead& head = p.head;
  FilmBackwardPlan plan;
  const bool gradients_aligned = choose_film_branches(p, precision.dtype, plan);
  const OutputSize outputs[] = {
      {count_branches(plan) * head.rows, head.hidden},
      {p.grad_out_weight.data ? head.classes : 0, head.hidden},
      {p.grad_film_weight.data ? 2 * head.hidden : 0, head.condition_width},
      {p.grad_condition.data ? head.rows : 0, head.condition_width}};
  plan.launch = choose_launch(precision, aligned(head, precision.dtype), work(head), outputs, 4,
                              device, request);
  plan.copy_gradients = plan.out_branches > 1 || (plan.launch.aligned && !gradients_aligned);
  Layout layout;
  const int64_t items =
      size_film_backward(p, precision.dtype, plan.launch, false, device, request, layout, plan);
  plan.launch.workspace_bytes = layout.bytes();
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
  choose_film_branches(p, dtype, backward);
  backward.weighted = step.mixed;
  backward.features_ready = p.leaks.head == 0;
  backward.features_offset = plan.forward.features_offset;
  items = std::max(items, size_film_backward(p, dtype, plan.launch, keep_sums, device, request,
                                             layout, backward));
  backward.gradients_offset = step.plane_offset;
  return items;
}

}  // namespace

FilmStepPlan plan_film_step(const FilmHeadStep& p, Precision precision, const Device& device,
                            WorkspaceLimit limit, const PlanRequest& request) {
  const FilmHead& head = p.head;
  const Dtype dtype = precision.dtype;
  FilmHeadBackward b = p;
  // every branch has a gradient; plans ask no more than whether it is there
  b.grad_fused = b.grad_unimodal[0] = b.grad_unimodal[1] = {&p, 0};

  FilmStepPlan plan;
  StepPlan& step = plan.step;
  step.branches = 3;
  const bool features = p.grad_condition.data || p.grad_target.data;
  const bool parameters =
      p.grad_film_weight.data || p.grad_out_weight.data || p.grad_film_bias || p.grad_out_bias;
  choose_gradients(features, parameters, p.leaks, step);
  choose_film_branches(b, dtype, plan.backward);
  const OutputSize outputs[] = {{head.rows, 2 * head.hidden}, {3 * head.rows, head.classes}};
  plan.launch =
      choose_launch(precision, aligned(head, dtype), work(head), outputs, 2, device, request);
  if (step.gradients) {
    step.plane_count = 3;
    for (int k = 0; k < 3; ++k) step.planes[plan.backward.slot[k]] = {k, 0, 0, 0};
  }

  // all rows, with splits, without, or as many tiles of rows as fit
  const int64_t tile_rows = tile_shape(plan.launch.tile).rows;
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
  if (bytes(rows, request) > limit.bytes) {
    with = &unsplit;
    const int64_t one = bytes(tile_rows, unsplit),
                  row_bytes = (bytes(2 * tile_rows, unsplit) - one) / tile_rows;
    const int64_t fixed = one - tile_rows * row_bytes;
    const int64_t least_rows = plan.launch.executor == Executor::kLibrary ? limit.least_rows : 0;
    rows = choose_chunk(head.rows, row_bytes, limit.bytes - fixed, least_rows, tile_rows);
  }
  step.chunks = count_chunks(head.rows, rows);
  const bool keep_sums = step.chunks > 1 && dtype == Dtype::kBFloat16;
  Layout layout;
  const int64_t items = size_film_step(b, dtype, rows, keep_sums, device, *with, layout, plan);
  finish_step(std::max(items, row_items(rows, device)), p.loss, head.present, head.rows, device,
              layout, plan.launch, step);
  return plan;
}

}  // namespace dgl_ext
