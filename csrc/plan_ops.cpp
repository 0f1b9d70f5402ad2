// The plan of the CUDA kernels for a head and a device, as numbers for dgl_ext/plan.py to show. It
// touches no GPU, so that it can be asked anywhere.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"
#include "plan.h"

namespace dgl_ext {
namespace {

using Numbers = std::vector<int64_t>;

// Plans read addresses for their alignment only.
alignas(16) char anywhere[16];

ConstMatrix input(int64_t columns) { return {anywhere, columns}; }
Matrix output(int64_t columns) { return {anywhere, columns}; }

Dtype dtype_named(const Checks& checks, const std::string& name) {
  if (name == "float64") return Dtype::kFloat64;
  if (name == "float32") return Dtype::kFloat32;
  if (name == "bfloat16") return Dtype::kBFloat16;
  if (name == "float16") return Dtype::kFloat16;
  checks.fail("dtype", "float64, float32, bfloat16 or float16", name);
}

void append(Numbers& numbers, const LaunchShape& launch) {
  const TileShape& tile = shape_of(launch.tile);
  const Numbers more{launch.executor != Executor::kFused,
                     static_cast<int64_t>(launch.tile),
                     tile.rows,
                     tile.columns,
                     tile.depth,
                     launch.cooperative,
                     launch.grid,
                     launch.workspace_bytes};
  numbers.insert(numbers.end(), more.begin(), more.end());
}

Numbers linear_plan(int64_t rows, const Numbers& widths, int64_t classes, Precision precision,
                    const Device& device) {
  LinearHeadForward forward;
  LinearHead& head = forward.head;
  head.rows = rows;
  head.classes = classes;
  head.modalities = static_cast<int>(widths.size());
  LinearHeadBackward backward;
  for (int i = 0; i < head.modalities; ++i) {
    head.width[i] = widths[i];
    head.feature[i] = head.weight[i] = input(widths[i]);
    forward.branch_bias[i] = anywhere;
    forward.unimodal[i] = output(classes);
    backward.grad_unimodal[i] = input(classes);
    backward.grad_feature[i] = backward.grad_weight[i] = output(widths[i]);
  }
  forward.fused = output(classes);
  backward.head = head;
  backward.grad_fused = input(classes);
  backward.grad_fused_bias = anywhere;
  Numbers numbers;
  append(numbers, plan_linear_forward(forward, precision, device).launch);
  append(numbers, plan_linear_backward(backward, precision, device).launch);
  return numbers;
}

Numbers film_plan(int64_t rows, const Numbers& widths, int64_t classes, Precision precision,
                  const Device& device) {
  FilmHeadForward forward;
  FilmHead& head = forward.head;
  head.rows = rows;
  head.condition_width = widths[0];
  head.hidden = widths[1];
  head.classes = classes;
  head.condition = head.film_weight = input(widths[0]);
  head.target = head.out_weight = input(widths[1]);
  head.film_bias = head.out_bias = anywhere;
  forward.fused = forward.unimodal[0] = forward.unimodal[1] = output(classes);
  forward.modulation = output(2 * widths[1]);
  FilmHeadBackward backward;
  backward.head = head;
  backward.modulation = input(2 * widths[1]);
  backward.grad_fused = backward.grad_unimodal[0] = backward.grad_unimodal[1] = input(classes);
  backward.grad_condition = backward.grad_film_weight = output(widths[0]);
  backward.grad_target = backward.grad_out_weight = output(widths[1]);
  backward.grad_film_bias = backward.grad_out_bias = anywhere;
  Numbers numbers;
  append(numbers, plan_film_forward(forward, precision, device).launch);
  append(numbers, plan_film_backward(backward, precision, device).launch);
  return numbers;
}

// `device`: multiprocessors, 10 * major + minor, then the resident CTAs of every tile.
Numbers cuda_plan(bool film, int64_t rows, Numbers widths, int64_t classes, std::string dtype,
                  bool allow_tf32, Numbers device_numbers) {
  const Checks checks("cuda_plan");
  const auto count = static_cast<int64_t>(widths.size());
  if (film ? count != 2 : count < 1 || count > kMaxModalities) {
    checks.fail("widths", film ? "2 entries" : "1 to 8 entries", std::to_string(count));
  }
  if (rows < 0 || classes < 0 || *std::min_element(widths.begin(), widths.end()) < 0) {
    checks.fail("rows, widths, classes", "sizes of 0 or more", "a negative one");
  }
  checks.length("device", device_numbers.size(), 2 + kTileCount);
  Device device;
  device.multiprocessors = static_cast<int>(device_numbers[0]);
  device.capability = static_cast<int>(device_numbers[1]);
  for (int tile = 0; tile < kTileCount; ++tile) {
    device.resident_ctas[tile] = static_cast<int>(device_numbers[2 + tile]);
  }
  const Precision precision{dtype_named(checks, dtype), allow_tf32};
  return (film ? film_plan : linear_plan)(rows, widths, classes, precision, device);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgl_ext, m) {
  m.def(
      "cuda_plan(bool film, int rows, int[] widths, int classes, str dtype, bool allow_tf32, "
      "int[] device) -> int[]");
}
STABLE_TORCH_LIBRARY_IMPL(dgl_ext, CompositeExplicitAutograd, m) {
  m.impl("cuda_plan", TORCH_BOX(&cuda_plan));
}

}  // namespace dgl_ext
