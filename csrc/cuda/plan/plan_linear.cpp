// The plans of the linear head (concat, sum).
#include <algorithm>

#include "cuda/plan/plan.h"
#include "cuda/plan/planning.h"

namespace dgl_ext {

using namespace planning;

namespace {

int64_t total_width(const LinearHead& head) {
  int64_t sum = 0;
  for (int i = 0; i < head.modalities; ++i) sum += head.width[i];
  return sum;
}
/// Forward, feature and weight gradients: three products of two flop per multiply-add.
double work(const LinearHead& head) {
  return 6. * double(head.rows) * double(total_width(head)) * double(head.classes);
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

/// Two modalities of one width, whose products run as one call if their operands lie in order.
bool is_pair(const LinearHead& head) {
  return head.modalities == 2 && head.width[0] == head.width[1];
}
/// Whether features are copied where no row lacks them: their gradients' products then are one
/// call.
bool copies_to_pair(const LinearHead& head, const Matrix* grad_weight, Dtype dtype) {
  return is_pair(head) && grad_weight[0].data && grad_weight[1].data &&
         head.feature[1].data < head.feature[0].data &&
         2 * head.rows * head.width[0] * element_size(dtype) <= kCopiedFeatures;
}

void copy_features(const LinearHead& head, const Matrix* grad_weight, bool all, Dtype dtype,
                   Layout& layout, LinearBackwardPlan& plan) {
  for (int i = 0; i < head.modalities; ++i) {
    const int64_t pitch = copied_columns(all || head.present[i], grad_weight[i], head.width[i]);
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
  const int64_t size = head.classes * accumulator_size(dtype);
  if (plan.partials) {
    plan.weight_partial_offset = layout.add(plan.row_splits * plan.weight_partial_columns * size);
  }
  plan.bias_partial_offset = layout.add(plan.bias_splits * (head.modalities + 1) * size);
}

/// The plane's number; it is added unless it is there.
int plane_of(const GradientPlane& wanted, GradientPlane* planes, int& count) {
  for (int i = 0; i < count; ++i) {
    const GradientPlane& have = planes[i];
    if (have.first == wanted.first && have.begin == wanted.begin && have.end == wanted.end) {
      return i;
    }
  }
  planes[count] = wanted;
  return count++;
}

/// Where a backward launch takes gradient[main] + leak * gradient[other] from, one of which may be
/// missing.
GradientSource source_of(const LinearHeadBackward& p, int main, int other, double leak, Dtype dtype,
                         LinearBackwardPlan& plan) {
  const auto gradient = [&](int index) {
    return index == 0 ? p.grad_fused : p.grad_unimodal[index - 1];
  };
  if (!gradient(other).data) leak = 0;
  const bool both = gradient(main).data && leak != 0;
  if (both) return {-1, plane_of({main, other, other + 1, leak}, plan.planes, plan.plane_count), 1};
  const int only = gradient(main).data ? main : other;
  const double scale = only == main ? 1 : leak;
  if (plan.launch.aligned && !allows_16_byte_copies(gradient(only), dtype)) {
    return {-1, plane_of({only, 0, 0, 0}, plan.planes, plan.plane_count), scale};
  }
  return {only, -1, scale};
}

/// Which planes a step needs, and what of them goes where.
void choose_planes(const LinearHeadStep& p, StepPlan& step, LinearBackwardPlan& backward) {
  const LinearHead& head = p.head;
  const auto weights_wanted = [&](int i) { return p.grad_weight[i].data || p.grad_branch_bias[i]; };
  bool features = false, parameters = p.grad_fused_bias != nullptr;
  for (int i = 0; i < head.modalities; ++i) {
    features |= p.grad_feature[i].data != nullptr;
    parameters |= weights_wanted(i);
  }
  choose_gradients(features, parameters, p.leaks, step);
  const auto plane = [&](int first, int begin, int end, double leak) {
    if (leak == 0) begin = end = 0;
    return plane_of({first, begin, end, leak}, step.planes, step.plane_count);
  };
  // planes in the order of the weights that they are multiplied with, which may make one call
  const bool turned = is_pair(head) && head.weight[1].data < head.weight[0].data;
  for (int k = 0; k < head.modalities; ++k) {
    const int i = turned ? 1 - k : k;
    if (!p.grad_feature[i].data) continue;
    const int branch = step.mixed ? 0 : i + 1;
    backward.to_feature[i] = {branch, plane(i + 1, 0, 1, p.leaks.encoder), 1};
  }
  for (int i = 0; i < head.modalities; ++i) {
    if (!weights_wanted(i)) continue;
    const int index = plane(0, i + 1, i + 2, p.leaks.head);
    backward.to_weight[i] = {0, index, 1};
    backward.bias_plane[i + 1] = index;
  }
  if (p.grad_fused_bias) {
    backward.bias_plane[0] = plane(0, 1, head.modalities + 1, p.leaks.head);
  }
}

/// How the gradients of a backward launch or of a chunk of a step are split.
struct GradientSplits {
  int64_t limit;     ///< bytes that split sums may take
  bool keep_sums;    ///< in the workspace, though they be of one split
  bool copies_pair;  ///< features are copied where no row lacks them, too
};

/// Tiles, splits and workspace of the gradients of `rows` rows; returns the work items.
int64_t size_gradients(const LinearHeadBackward& p, int64_t rows, Dtype dtype,
                       const LaunchShape& launch, const GradientSplits& how, const Device& device,
                       const PlanRequest& request, Layout& layout, LinearBackwardPlan& plan) {
  const LinearHead& head = p.head;
  const bool library = launch.executor == Executor::kLibrary;
  const int64_t depth = tile_shape(launch.tile).depth, steps = ceil_div(rows, depth);
  int64_t feature_tiles = 0;
  int biases = p.grad_fused_bias != nullptr;
  for (int i = 0; i < head.modalities; ++i) {
    if (p.grad_weight[i].data) plan.weight[i] = tiles_of(launch.tile, head.classes, head.width[i]);
    if (p.grad_feature[i].data) plan.feature[i] = tiles_of(launch.tile, rows, head.width[i]);
    plan.weight_tiles += plan.weight[i].count;
    feature_tiles += plan.feature[i].count;
    biases += p.grad_branch_bias[i] != nullptr;
  }
  plan.bias_tiles = biases * ceil_div(head.classes, kColumnTile);

  int64_t wanted = library ? 1 : request.splits;
  if (wanted == 0) {
    const int64_t feature_steps = feature_tiles * ceil_div(head.classes, depth);
    wanted = choose_row_splits(steps, plan.weight_tiles * steps + feature_steps, device);
  }
  const int64_t sums =
      head.classes * (total_width(head) + head.modalities + 1) * accumulator_size(dtype);
  if (sums > 0) wanted = std::max<int64_t>(1, std::min(wanted, how.limit / sums));
  plan.rows_per_split = choose_depth(steps, wanted, depth);
  plan.row_splits = int(std::max<int64_t>(1, ceil_div(rows, plan.rows_per_split)));
  plan.partials = how.keep_sums || plan.row_splits > 1;
  plan.bias_splits = library ? element_grid(device) : plan.row_splits;
  plan.plane_rows = rows;
  plan.padded_classes = padded(head.classes);
  copy_features(head, p.grad_weight, how.copies_pair, dtype, layout, plan);
  if (plan.partials || library) place_partials(head, dtype, layout, plan);

  plan.weight_end = plan.weight_tiles * plan.row_splits;
  plan.feature_end = plan.weight_end + feature_tiles;
  plan.bias_end = plan.feature_end + plan.bias_tiles * plan.row_splits;
  return plan.bias_end;
}

}  // namespace

LinearForwardPlan plan_linear_forward(const LinearHeadForward& p, Precision precision,
                                      const Device& device, const PlanRequest& request) {
  const LinearHead& head = p.head;
  LinearForwardPlan plan;
  const OutputSize output{head.rows, head.classes * head.modalities};
  plan.launch = choose_launch(precision, aligned(head, precision.dtype), work(head), &output, 1,
                              device, request);
  const TileShape& shape = tile_shape(plan.launch.tile);
  const int64_t steps = width_steps(head, shape.depth);
  plan.tiles = tiles_of(plan.launch.tile, head.rows, head.classes);
  plan.plane_rows = head.rows;
  plan.padded_classes = padded(head.classes);
  const int64_t plane_row = plan.padded_classes * accumulator_size(precision.dtype);
  const bool library = plan.launch.executor == Executor::kLibrary;
  const bool enough_tiles = 2 * plan.tiles.count >= device.multiprocessors;
  plan.direct = !library &&
                (request.splits > 0 ? request.splits == 1 : enough_tiles || steps <= kDirectSteps);
  if (plan.direct) {
    plan.items = plan.tiles.count;
    plan.launch.cooperative = false;
    plan.launch.workspace_bytes = head.modalities > 1 ? head.rows * plane_row : 0;
    plan.launch.grid = choose_grid(plan.launch, plan.items, device);
    return plan;
  }
  const int64_t wanted = choose_splits(plan.launch, plan.tiles.count, device, request);
  const int64_t splits = split_widths(head, steps, wanted, shape.depth, plan);
  if (library) {
    plan.plane_rows =
        choose_chunk(head.rows, splits * plane_row, kDefaultWorkspace, kLeastChunkRows, shape.rows);
  }
  plan.items = splits * plan.tiles.count;
  plan.launch.workspace_bytes = splits * plan.plane_rows * plane_row;
  plan.launch.grid =
      choose_grid(plan.launch, std::max(plan.items, row_items(head.rows, device)), device);
  return plan;
}

LinearBackwardPlan plan_linear_backward(const LinearHeadBackward& p, Precision precision,
                                        const Device& device, const PlanRequest& request) {
  const LinearHead& head = p.head;
  const Dtype dtype = precision.dtype;
  LinearBackwardPlan plan;
  OutputSize outputs[2 * kMaxModalities];
  int count = 0;
  for (int i = 0; i < head.modalities; ++i) {
    if (p.grad_weight[i].data) outputs[count++] = {head.classes, head.width[i]};
    if (p.grad_feature[i].data) outputs[count++] = {head.rows, head.width[i]};
  }
  plan.launch =
      choose_launch(precision, aligned(head, dtype), work(head), outputs, count, device, request);
  for (int i = 0; i < head.modalities; ++i) {
    if (p.grad_feature[i].data) {
      plan.to_feature[i] = source_of(p, i + 1, 0, p.leaks.encoder, dtype, plan);
    }
    if (p.grad_weight[i].data) {
      plan.to_weight[i] = source_of(p, 0, i + 1, p.leaks.head, dtype, plan);
    }
  }
  Layout layout;
  plan.plane_offset =
      layout.add(plan.plane_count * head.rows * padded(head.classes) * element_size(dtype));
  int64_t items = size_gradients(p, head.rows, dtype, plan.launch, {INT64_MAX, false, false},
                                 device, request, layout, plan);
  const bool prepares = plan.plane_count > 0 || plan.has_masked;
  if (prepares) items = std::max(items, row_items(head.rows, device));
  plan.launch.cooperative &= prepares || plan.partials;
  plan.launch.workspace_bytes = layout.bytes();
  plan.launch.grid = choose_grid(plan.launch, items, device);
  return plan;
}

LinearStepPlan plan_linear_step(const LinearHeadStep& p, Precision precision, const Device& device,
                                WorkspaceLimit limit, const PlanRequest& request) {
  const LinearHead& head = p.head;
  const Dtype dtype = precision.dtype;
  LinearStepPlan plan;
  StepPlan& step = plan.step;
  LinearForwardPlan& forward = plan.forward;
  step.branches = head.modalities + 1;
  step.padded_classes = forward.padded_classes = padded(head.classes);
  choose_planes(p, step, plan.backward);

  const OutputSize all_logits{head.rows, head.classes * head.modalities};
  plan.launch =
      choose_launch(precision, aligned(head, dtype), work(head), &all_logits, 1, device, request);
  const bool library = plan.launch.executor == Executor::kLibrary;
  const TileShape& shape = tile_shape(plan.launch.tile);

  const bool copies = library && copies_to_pair(head, p.grad_weight, dtype);
  int64_t copied = 0;
  for (int i = 0; i < head.modalities; ++i) {
    copied += copied_columns(copies || head.present[i], p.grad_weight[i], head.width[i]);
  }
  // a quarter of the workspace is for split sums of weights, the rest for what there is per row
  const int64_t sums_limit = limit.bytes / 4;
  const int64_t row_limit = library ? limit.bytes : limit.bytes - sums_limit;
  const auto row_bytes = [&](int64_t splits) {
    return step.padded_classes *
               (splits * accumulator_size(dtype) + step.plane_count * element_size(dtype)) +
           copied * element_size(dtype);
  };
  const int64_t rows = choose_chunk(head.rows, row_bytes(head.modalities), row_limit,
                                    library ? limit.least_rows : 0, shape.rows);
  step.chunk_rows = forward.plane_rows = rows;
  step.chunks = count_chunks(head.rows, rows);

  forward.direct = false;
  forward.tiles = tiles_of(plan.launch.tile, rows, head.classes);
  const int64_t steps = width_steps(head, shape.depth);
  int64_t wanted = choose_splits(plan.launch, forward.tiles.count, device, request);
  wanted = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(steps, 1));
  int64_t splits = split_widths(head, steps, wanted, shape.depth, forward);
  while (wanted > 1 && row_bytes(splits) * rows > row_limit) {
    splits = split_widths(head, steps, --wanted, shape.depth, forward);
  }
  forward.items = splits * forward.tiles.count;

  Layout layout;
  layout.add(splits * rows * step.padded_classes * accumulator_size(dtype));
  step.plane_offset = plan.backward.plane_offset =
      layout.add(step.plane_count * rows * step.padded_classes * element_size(dtype));
  // chunks add up in the accumulator type: in the output itself unless that is narrower
  const GradientSplits how{sums_limit, step.chunks > 1 && dtype == Dtype::kBFloat16, copies};
  const int64_t items = std::max(
      {forward.items, row_items(rows, device),
       size_gradients(p, rows, dtype, plan.launch, how, device, request, layout, plan.backward)});
  finish_step(items, p.loss, head.present, head.rows, device, layout, plan.launch, step);
  return plan;
}

}  // namespace dgl_ext
