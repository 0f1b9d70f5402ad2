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
  const OutputSize output{head.rows, head.classes * head.modalities};
  plan.launch = choose_launch(precision, aligned(head, precision.dtype), work(head), &output, 1,
                              device, request);
  const TileShape& shape = tile_shape(plan.launch.tile);
  const OutputSize logits{head.rows, head.classes};
  const int64_t tiles = count_tiles(plan.launch.tile, &logits, 1);
  const int64_t steps = width_steps(head, shape.depth);
  plan.plane_rows = head.rows;
  plan.padded_classes = padded(head.classes);
  const int64_t plane_row = plan.padded_classes * accumulator_size(precision.dtype);
  if (plan.launch.executor == Executor::kLibrary) {
    plan.direct = false;
    const int64_t splits = split_widths(head, steps, 1, shape.depth, plan);
    plan.plane_rows =
        choose_chunk(head.rows, splits * plane_row, kDefaultWorkspace, kLeastChunkRows, shape.rows);
    plan.launch.workspace_bytes = splits * plan.plane_rows * plane_row;
    plan.launch.grid = element_grid(device);
    return plan;
  }
  const int64_t plane = head.rows * plane_row;
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
  const int64_t items = std::max(splits * tiles, row_items(head.rows, device));
  plan.launch.grid = choose_grid(plan.launch, items, device);
  return plan;
}

LinearBackwardPlan plan_linear_backward(const LinearHeadBackward& p, Precision precision,
                                        const Device& device, const PlanRequest& request) {
  const LinearHead& head = p.head;
  LinearBackwardPlan plan;
  OutputSize outputs[2 * kMaxModalities];
  int weights = 0, count = 0;
  for (int i = 0; i < head.modalities; ++i) {
    if (p.grad_weight[i].data) outputs[count++] = {head.classes, head.width[i]};
  }
  weights = count;
  for (int i = 0; i < head.modalities; ++i) {
    if (p.grad_feature[i].data) outputs[count++] = {head.rows, head.width[i]};
  }
  plan.launch = choose_launch(precision, aligned(head, precision.dtype), work(head), outputs, count,
                              device, request);
  SourceChooser(p, precision.dtype, plan).choose();

  const Tile tile = plan.launch.tile;
  const int64_t depth = tile_shape(tile).depth, steps = ceil_div(head.rows, depth);
  const int64_t weight_tiles = count_tiles(tile, outputs, weights);
  const int64_t feature_tiles = count_tiles(tile, outputs + weights, count - weights);
  const bool library = plan.launch.executor == Executor::kLibrary;
  int64_t wanted = library ? 1 : request.splits;
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
  plan.bias_splits = library ? element_grid(device) : plan.row_splits;
  Layout layout;
  plan.plane_offset = layout.add(plan.plane_count * head.rows * plan.padded_classes *
                                 element_size(precision.dtype));
  copy_features(head, p.grad_weight, false, precision.dtype, layout, plan);
  if (plan.partials || library) place_partials(head, precision.dtype, layout, plan);
  plan.launch.workspace_bytes = layout.bytes();
  if (library) {
    plan.launch.grid = element_grid(device);
    return plan;
  }
  plan.launch.cooperative = plan.plane_count > 0 || plan.has_masked || plan.partials;
  const int64_t bias_tiles = biases * ceil_div(head.classes, 32);
  int64_t items = (weight_tiles + bias_tiles) * plan.row_splits + feature_tiles;
  if (plan.plane_count > 0 || plan.has_masked)
    items = std::max(items, row_items(head.rows, device));
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
    // planes in the order of the weights that they are multiplied with, which may make one call
    const LinearHead& head = p_.head;
    const bool turned = is_pair(head) && head.weight[1].data < head.weight[0].data;
    for (int k = 0; k < count; ++k) {
      const int i = turned ? 1 - k : k;
      if (p_.grad_feature[i].data) {
        const int branch = plan_.step.mixed ? 0 : i + 1;
        plan_.backward.to_feature[i] = {branch, plane(i + 1, 0, 1, p_.leaks.encoder), 1};
      }
    }
    for (int i = 0; i < count; ++i) {
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

}  // namespace

LinearStepPlan plan_linear_step(const LinearHeadStep& p, Precision precision, const Device& device,
                                WorkspaceLimit limit, const PlanRequest& request) {
  const LinearHead& head = p.head;
  const Dtype dtype = precision.dtype;
  LinearStepPlan plan;
  StepPlan& step = plan.step;
  LinearBackwardPlan& backward = plan.backward;
  step.branches = head.modalities + 1;
  step.padded_classes = plan.forward.padded_classes = backward.padded_classes =
      padded(head.classes);
  StepPlanes(p, plan).choose();

  OutputSize weights[kMaxModalities];
  int weight_count = 0, biases = p.grad_fused_bias != nullptr;
  for (int i = 0; i < head.modalities; ++i) {
    if (p.grad_weight[i].data) weights[weight_count++] = {head.classes, head.width[i]};
    biases += p.grad_branch_bias[i] != nullptr;
  }
  const OutputSize all_logits{head.rows, head.classes * head.modalities};
  plan.launch =
      choose_launch(precision, aligned(head, dtype), work(head), &all_logits, 1, device, request);
  const bool library = plan.launch.executor == Executor::kLibrary;
  plan.launch.cooperative = !library;
  const TileShape& shape = tile_shape(plan.launch.tile);

  const bool copies = library && copies_to_pair(head, p.grad_weight, dtype);
  int64_t copied = 0;
  for (int i = 0; i < head.modalities; ++i) {
    copied += copied_columns(copies || head.present[i], p.grad_weight[i], head.width[i]);
  }
  // a quarter of the workspace is for split sums of weights, the rest for what there is per row
  const int64_t row_limit = library ? limit.bytes : limit.bytes - limit.bytes / 4;
  const int64_t least_rows = library ? limit.least_rows : 0;
  const auto row_bytes = [&](int64_t splits) {
    return step.padded_classes *
               (splits * accumulator_size(dtype) + step.plane_count * element_size(dtype)) +
           copied * element_size(dtype);
  };
  const int64_t rows =
      choose_chunk(head.rows, row_bytes(head.modalities), row_limit, least_rows, shape.rows);
  step.chunk_rows = plan.forward.plane_rows = backward.plane_rows = rows;
  step.chunks = count_chunks(head.rows, rows);

  const OutputSize logits{rows, head.classes};
  const int64_t tiles = count_tiles(plan.launch.tile, &logits, 1);
  const int64_t steps = width_steps(head, shape.depth);
  int64_t wanted = library              ? 1
                   : request.splits > 0 ? request.splits
                                        : device.multiprocessors / std::max<int64_t>(tiles, 1);
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
    const OutputSize feature{p.grad_feature[i].data ? rows : 0, head.width[i]};
    feature_tiles += count_tiles(plan.launch.tile, &feature, 1);
  }
  int64_t row_splits = library ? 1 : request.splits;
  if (row_splits == 0) {
    row_splits = choose_row_splits(
        row_steps, weight_tiles * row_steps + feature_tiles * ceil_div(head.classes, shape.depth),
        device);
  }
  const int64_t sums = head.classes * (total_width(head) + step.branches) * accumulator_size(dtype);
  if (row_splits * sums > limit.bytes / 4) {
    row_splits = std::max<int64_t>(1, limit.bytes / 4 / std::max<int64_t>(sums, 1));
  }
  backward.rows_per_split = choose_depth(row_steps, row_splits, shape.depth);
  backward.row_splits = int(std::max<int64_t>(1, ceil_div(rows, backward.rows_per_split)));
  // chunks add up in the accumulator type: in the output itself unless that is narrower
  backward.partials = backward.row_splits > 1 || (step.chunks > 1 && dtype == Dtype::kBFloat16);
  backward.bias_splits = library ? element_grid(device) : backward.row_splits;

  Layout layout;
  layout.add(splits * rows * step.padded_classes * accumulator_size(dtype));
  step.plane_offset = backward.plane_offset =
      layout.add(step.plane_count * rows * step.padded_classes * element_size(dtype));
  copy_features(head, p.grad_weight, copies, dtype, layout, backward);
  if (backward.partials || library) place_partials(head, dtype, layout, backward);
  const int64_t items = std::max(
      {splits * tiles, row_items(rows, device),
       (weight_tiles + biases * ceil_div(head.classes, 32)) * backward.row_splits + feature_tiles});
  plan.launch.grid = library ? element_grid(device) : choose_grid(plan.launch, items, device);
  choose_counting(plan.launch, p.loss, head.present, head.rows, step);
  place_sums(plan.launch.grid, layout, step);
  plan.launch.workspace_bytes = layout.bytes();
  return plan;
}

}  // namespace dgl_ext
