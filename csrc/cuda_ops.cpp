// The ops on CUDA: tensors become structs, the plan chooses, a launcher runs. Its own module, so
// that the package loads where torch has no CUDA.
//
// Every call runs under the features' device, on the current stream, with its workspace from
// torch's caching allocator, and waits for nothing: it can be captured into a CUDA graph. Where the
// plan says that library GEMMs win, the composed ops (dgl_ext/composed.py) are called instead.

// torch_device.h comes before torch's headers, since it decides what they declare. Angle brackets
// let the tests' emulated build put its own in its place.
#include <Python.h>
#include <cuda/torch_device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <climits>
#include <cstdlib>
#include <map>
#include <mutex>

#include "checks.h"
#include "cuda/launch.h"
#include "plan.h"
#include "row_stride.h"

namespace dgl_ext {
namespace {

// What stands for the address of an input without elements: "there", but never read.
alignas(16) char nothing_to_read[16];

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:  // the checks let no fifth dtype pass
      return Dtype::kFloat16;
  }
}

void check(const char* op, cudaError_t status, const char* action) {
  if (status == cudaSuccess) return;
  throw std::runtime_error("dgl_ext::" + std::string(op) + ": " + action + ": CUDA error " +
                           std::to_string(int(status)) + ", " + cudaGetErrorString(status));
}

// Of the GPU that is current and has this index; asked once per GPU.
const Device& current_device(const char* op, int32_t index) {
  static std::mutex mutex;
  static std::map<int32_t, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = known.try_emplace(index);
  if (is_new) {
    const cudaError_t status = query_device(&found->second);
    if (status != cudaSuccess) known.erase(found);
    check(op, status, "asking the GPU for its properties");
    // Leaves multiprocessors to others, such as NCCL's kernels.
    if (const char* bound = std::getenv("DGL_EXT_MAX_CTAS")) {
      char* end = nullptr;
      const long value = std::strtol(bound, &end, 10);
      if (value < 1 || value > INT_MAX || *end != '\0') {
        known.erase(found);
        throw std::runtime_error("DGL_EXT_MAX_CTAS: expected a positive int, got \"" +
                                 std::string(bound) + "\"");
      }
      found->second.max_ctas = static_cast<int>(value);
    }
  }
  return found->second;
}

// One call: its device, its stream, and what it must keep alive until the launch is queued.
class Call {
 public:
  Call(const char* op, const Tensor& like)
      : op_(op), like_(like), index_(like.get_device_index()), guard_(index_) {}

  // (..., D) with contiguous columns and one row stride; a copy where the tensor is not like that.
  ConstMatrix matrix(const Tensor& tensor) {
    const int64_t columns = tensor.size(tensor.dim() - 1);
    if (tensor.numel() == 0) return {nothing_to_read, columns};
    const bool contiguous_columns = columns == 1 || tensor.stride(tensor.dim() - 1) == 1;
    if (const auto stride = single_row_stride(tensor); stride && contiguous_columns) {
      return {tensor.data_ptr(), *stride};
    }
    kept_.push_back(torch::stable::contiguous(tensor));
    return {kept_.back().data_ptr(), columns};
  }
  ConstMatrix matrix(const std::optional<Tensor>& tensor) {
    return tensor ? matrix(*tensor) : ConstMatrix{};
  }
  const void* vector(const std::optional<Tensor>& tensor) {
    if (!tensor) return nullptr;
    kept_.push_back(torch::stable::contiguous(*tensor));
    return kept_.back().numel() == 0 ? nothing_to_read : kept_.back().data_ptr();
  }

  Tensor empty(const Shape& shape, ScalarType dtype) const {
    const torch::stable::Device device(kDeviceType, index_);
    return torch::stable::empty(shape, dtype, std::nullopt, device);
  }
  Tensor empty(const Shape& shape) const { return empty(shape, like_.scalar_type()); }

  // Whether library GEMMs shall run. A caller who wants the kernels only is told if there are none.
  bool goes_composed(const LaunchShape& launch, bool kernel_only) const {
    if (launch.path != Path::kComposed) return false;
    if (!kernel_only) return true;
    const int capability = device().capability;
    throw std::runtime_error(
        "dgl_ext::" + std::string(op_) +
        ": kernel_only: expected a GPU of compute capability 8.0 or more, got " +
        std::to_string(capability / 10) + "." + std::to_string(capability % 10));
  }

  const Device& device() const { return current_device(op_, index_); }

  template <class Launcher, class Problem, class Plan>
  void launch(Launcher launcher, const Problem& problem, Precision precision, const Plan& plan) {
    const int64_t bytes = plan.launch.workspace_bytes;
    if (bytes > 0) kept_.push_back(empty({bytes}, ScalarType::Byte));
    void* workspace = bytes > 0 ? kept_.back().data_ptr() : nullptr;
    check(op_, launcher(problem, precision, plan, workspace, current_stream(index_)), "launching");
  }

 private:
  const char* op_;
  const Tensor& like_;
  const int32_t index_;
  const DeviceGuard guard_;
  std::vector<Tensor> kept_;
};

// The kernels' view of a row-major result; null where it has no elements to write.
Matrix result_rows(const Tensor& tensor) {
  return {tensor.numel() == 0 ? nullptr : tensor.data_ptr(), tensor.size(tensor.dim() - 1)};
}

const void* at_column(const void* data, int64_t column, Dtype dtype) {
  return static_cast<const char*>(data) + column * element_size(dtype);
}
void* at_column(void* data, int64_t column, Dtype dtype) {
  return data ? static_cast<char*>(data) + column * element_size(dtype) : nullptr;
}

template <class T>
StableIValue boxed(const T& value) {
  return torch::stable::detail::from(value);
}
// A vector<bool> has no array inside for the list to be made from.
StableIValue boxed(const std::vector<bool>& values) {
  std::array<bool, kMaxModalities> flags{};
  std::copy(values.begin(), values.end(), flags.begin());
  return torch::stable::detail::from(
      torch::headeronly::HeaderOnlyArrayRef<bool>(flags.data(), values.size()));
}

// Calls an op that stands beside this one, with the same arguments and result.
template <class... Arguments>
std::vector<Tensor> composed(const char* op, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{boxed(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<std::vector<Tensor>>(stack[0]);
}

// ---- concat and sum ----

struct LinearArguments {
  bool shared;                 // one weight and one bias for all modalities
  std::vector<int64_t> begin;  // of each modality's columns in the weight that holds them
  LinearHead head;
};

LinearArguments parse_linear(const Checks& checks, Call& call, const std::vector<Tensor>& features,
                             const std::vector<Tensor>& weights) {
  LinearArguments args;
  args.shared = weights.size() == 1;
  if (!args.shared) checks.length("weights", weights.size(), features.size());
  if (weights[0].dim() != 2) {
    checks.fail("weights[0]", "shape (C, D)", to_string(shape_of(weights[0])));
  }
  LinearHead& head = args.head;
  head.rows = leading_count(shape_of(features[0]));
  head.classes = weights[0].size(0);
  head.modalities = static_cast<int>(features.size());
  int64_t width = 0;
  for (int i = 0; i < head.modalities; ++i) {
    head.width[i] = features[i].size(features[i].dim() - 1);
    head.feature[i] = call.matrix(features[i]);
    args.begin.push_back(args.shared ? width : 0);
    width += head.width[i];
  }
  for (size_t w = 0; w < weights.size(); ++w) {
    const std::string name = Checks::indexed("weights", w);
    checks.like(name, weights[w], features[0]);
    checks.shape(name, weights[w], {head.classes, args.shared ? width : head.width[w]});
  }
  const Dtype dtype = dtype_of(features[0]);
  ConstMatrix weight;
  for (int i = 0; i < head.modalities; ++i) {
    if (i == 0 || !args.shared) weight = call.matrix(weights[i]);
    head.weight[i] = {at_column(weight.data, args.begin[i], dtype), weight.stride};
  }
  return args;
}

std::vector<Tensor> linear_forward(std::vector<Tensor> features, std::vector<Tensor> weights,
                                   OptionalTensors biases, bool allow_tf32, bool kernel_only) {
  const Checks checks("linear_head_forward", kOnCuda);
  Shape shape = checks.features(features, 1, kMaxModalities);
  Call call("linear_head_forward", features[0]);
  const LinearArguments args = parse_linear(checks, call, features, weights);
  checks.biases(biases, weights, features[0]);

  LinearHeadForward problem;
  problem.head = args.head;
  for (int i = 0; i < args.head.modalities; ++i) {
    problem.branch_bias[i] = call.vector(biases[args.shared ? 0 : i]);
  }
  if (args.shared) problem.fused_bias = problem.branch_bias[0];
  shape.push_back(args.head.classes);
  std::vector<Tensor> logits;  // fused first
  for (int i = 0; i <= args.head.modalities; ++i) logits.push_back(call.empty(shape));
  problem.fused = result_rows(logits[0]);
  for (int i = 0; i < args.head.modalities; ++i) problem.unimodal[i] = result_rows(logits[i + 1]);

  const Precision precision{dtype_of(features[0]), allow_tf32};
  const LinearForwardPlan plan =
      plan_linear_forward(problem, precision, call.device(), PlanRequest{kernel_only});
  if (call.goes_composed(plan.launch, kernel_only)) {
    return composed("dgl_ext::linear_head_forward_composed", features, weights, biases);
  }
  call.launch(linear_head_forward, problem, precision, plan);
  return logits;
}

std::vector<Tensor> linear_backward(OptionalTensors grad_outputs, std::vector<Tensor> features,
                                    std::vector<Tensor> weights, std::vector<bool> needs_features,
                                    std::vector<bool> needs_weights, std::vector<bool> needs_biases,
                                    double encoder_leak, double head_leak, bool allow_tf32,
                                    bool kernel_only) {
  const Checks checks("linear_head_backward", kOnCuda);
  const Shape leading = checks.features(features, 1, kMaxModalities);
  Call call("linear_head_backward", features[0]);
  const LinearArguments args = parse_linear(checks, call, features, weights);
  const LinearHead& head = args.head;
  checks.grad_outputs(grad_outputs, features.size() + 1, leading, head.classes, features[0]);
  checks.length("needs_features", needs_features.size(), features.size());
  checks.length("needs_weights", needs_weights.size(), weights.size());
  checks.length("needs_biases", needs_biases.size(), weights.size());

  const Dtype dtype = dtype_of(features[0]);
  LinearHeadBackward problem;
  problem.head = head;
  problem.leaks = {encoder_leak, head_leak};
  problem.grad_fused = call.matrix(grad_outputs[0]);
  for (int i = 0; i < head.modalities; ++i) {
    problem.grad_unimodal[i] = call.matrix(grad_outputs[i + 1]);
  }

  // What no gradient reaches is zero here; autograd.py does not ask for it.
  std::vector<Tensor> results;
  const auto result = [&](const Shape& shape, bool flows) {
    results.push_back(call.empty(shape));
    if (!flows) torch::stable::zero_(results.back());
    return result_rows(results.back());
  };
  for (int i = 0; i < head.modalities; ++i) {
    if (!needs_features[i]) continue;
    const bool flows = feature_flows(problem, i);
    const Matrix grad = result(shape_of(features[i]), flows);
    if (flows) problem.grad_feature[i] = grad;
  }
  for (size_t w = 0; w < weights.size(); ++w) {
    if (!needs_weights[w]) continue;
    const int first = args.shared ? 0 : static_cast<int>(w);
    const int last = args.shared ? head.modalities : first + 1;
    bool all_flow = true;
    for (int i = first; i < last; ++i) all_flow = all_flow && weight_flows(problem, i);
    const Matrix grad = result(shape_of(weights[w]), all_flow);
    for (int i = first; i < last; ++i) {
      if (head.width[i] == 0 || !weight_flows(problem, i)) continue;
      problem.grad_weight[i] = {at_column(grad.data, args.begin[i], dtype), grad.stride};
    }
  }
  for (size_t b = 0; b < weights.size(); ++b) {
    if (!needs_biases[b]) continue;
    const int i = static_cast<int>(b);
    const bool flows = args.shared ? fused_bias_flows(problem) : weight_flows(problem, i);
    const Matrix grad = result({head.classes}, flows);
    void*& target = args.shared ? problem.grad_fused_bias : problem.grad_branch_bias[i];
    if (flows) target = grad.data;
  }

  const Precision precision{dtype, allow_tf32};
  const LinearBackwardPlan plan =
      plan_linear_backward(problem, precision, call.device(), PlanRequest{kernel_only});
  if (call.goes_composed(plan.launch, kernel_only)) {
    return composed("dgl_ext::linear_head_backward_composed", grad_outputs, features, weights,
                    needs_features, needs_weights, needs_biases, encoder_leak, head_leak);
  }
  call.launch(linear_head_backward, problem, precision, plan);
  return results;
}

// ---- FiLM ----

FilmHead parse_film(const Checks& checks, Call& call, const std::vector<Tensor>& features,
                    const std::vector<Tensor>& weights, const OptionalTensors& biases) {
  checks.length("weights", weights.size(), 2);
  for (size_t w = 0; w < weights.size(); ++w) {
    checks.like(Checks::indexed("weights", w), weights[w], features[0]);
  }
  if (weights[1].dim() != 2) {
    checks.fail("weights[1]", "shape (C, H)", to_string(shape_of(weights[1])));
  }
  FilmHead head;
  head.rows = leading_count(shape_of(features[0]));
  head.condition_width = features[0].size(features[0].dim() - 1);
  head.hidden = features[1].size(features[1].dim() - 1);
  head.classes = weights[1].size(0);
  checks.shape("weights[0]", weights[0], {2 * head.hidden, head.condition_width});
  checks.shape("weights[1]", weights[1], {head.classes, head.hidden});
  checks.biases(biases, weights, features[0]);
  head.condition = call.matrix(features[0]);
  head.target = call.matrix(features[1]);
  head.film_weight = call.matrix(weights[0]);
  head.out_weight = call.matrix(weights[1]);
  head.film_bias = call.vector(biases[0]);
  head.out_bias = call.vector(biases[1]);
  return head;
}

std::vector<Tensor> film_forward(std::vector<Tensor> features, std::vector<Tensor> weights,
                                 OptionalTensors biases, bool allow_tf32, bool kernel_only) {
  const Checks checks("film_head_forward", kOnCuda);
  const Shape leading = checks.features(features, 2, 2);
  Call call("film_head_forward", features[0]);
  FilmHeadForward problem;
  problem.head = parse_film(checks, call, features, weights, biases);

  const auto shape = [&](int64_t columns) {
    Shape full = leading;
    full.push_back(columns);
    return full;
  };
  const Dtype dtype = dtype_of(features[0]);
  std::vector<Tensor> results;
  for (int k = 0; k < 3; ++k) results.push_back(call.empty(shape(problem.head.classes)));
  results.push_back(call.empty(shape(2 * problem.head.hidden),
                               dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float));
  problem.fused = result_rows(results[0]);
  problem.unimodal[0] = result_rows(results[1]);
  problem.unimodal[1] = result_rows(results[2]);
  problem.modulation = result_rows(results[3]);

  const Precision precision{dtype, allow_tf32};
  const FilmForwardPlan plan =
      plan_film_forward(problem, precision, call.device(), PlanRequest{kernel_only});
  if (call.goes_composed(plan.launch, kernel_only)) {
    return composed("dgl_ext::film_head_forward_composed", features, weights, biases);
  }
  call.launch(film_head_forward, problem, precision, plan);
  return results;
}

std::vector<Tensor> film_backward(OptionalTensors grad_outputs, std::vector<Tensor> features,
                                  std::vector<Tensor> weights, OptionalTensors biases, Tensor film,
                                  std::vector<bool> needs_features, std::vector<bool> needs_weights,
                                  std::vector<bool> needs_biases, double encoder_leak,
                                  double head_leak, bool allow_tf32, bool kernel_only) {
  const Checks checks("film_head_backward", kOnCuda);
  const Shape leading = checks.features(features, 2, 2);
  Call call("film_head_backward", features[0]);
  FilmHeadBackward problem;
  problem.head = parse_film(checks, call, features, weights, biases);
  checks.grad_outputs(grad_outputs, 3, leading, problem.head.classes, features[0]);
  checks.length("needs_features", needs_features.size(), 2);
  checks.length("needs_weights", needs_weights.size(), 2);
  checks.length("needs_biases", needs_biases.size(), 2);
  Shape film_shape = leading;
  film_shape.push_back(2 * problem.head.hidden);
  checks.shape("film", film, film_shape);
  const Dtype dtype = dtype_of(features[0]);
  const ScalarType saved = dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  checks.saved("film", film, features[0], saved);
  problem.leaks = {encoder_leak, head_leak};
  problem.modulation = call.matrix(film);
  problem.grad_fused = call.matrix(grad_outputs[0]);
  for (int k = 0; k < 2; ++k) problem.grad_unimodal[k] = call.matrix(grad_outputs[k + 1]);

  // What no gradient reaches is zero here; autograd.py does not ask for it.
  std::vector<Tensor> results;
  const auto result = [&](bool needed, const Shape& shape, bool flows) {
    if (!needed) return Matrix{};
    results.push_back(call.empty(shape));
    if (!flows) torch::stable::zero_(results.back());
    return flows ? result_rows(results.back()) : Matrix{};
  };
  const bool flows = parameters_flow(problem);
  problem.grad_condition =
      result(needs_features[0], shape_of(features[0]), condition_flows(problem));
  problem.grad_target = result(needs_features[1], shape_of(features[1]), target_flows(problem));
  problem.grad_film_weight =
      result(needs_weights[0], shape_of(weights[0]), film_weight_flows(problem));
  problem.grad_out_weight = result(needs_weights[1], shape_of(weights[1]), flows);
  problem.grad_film_bias = result(needs_biases[0], {2 * problem.head.hidden}, flows).data;
  problem.grad_out_bias = result(needs_biases[1], {problem.head.classes}, flows).data;

  const Precision precision{dtype, allow_tf32};
  const FilmBackwardPlan plan =
      plan_film_backward(problem, precision, call.device(), PlanRequest{kernel_only});
  if (call.goes_composed(plan.launch, kernel_only)) {
    return composed("dgl_ext::film_head_backward_composed", grad_outputs, features, weights, biases,
                    film, needs_features, needs_weights, needs_biases, encoder_leak, head_leak);
  }
  call.launch(film_head_backward, problem, precision, plan);
  return results;
}

// What plans know of the current GPU, in the order that cuda_plan takes it.
std::vector<int64_t> cuda_device() {
  int index = 0;
  check("cuda_device", cudaGetDevice(&index), "asking for the current GPU");
  const Device& device = current_device("cuda_device", index);
  std::vector<int64_t> numbers{device.multiprocessors, device.capability};
  numbers.insert(numbers.end(), std::begin(device.resident_ctas), std::end(device.resident_ctas));
  return numbers;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dgl_ext, m) { m.def("cuda_device() -> int[]"); }
STABLE_TORCH_LIBRARY_IMPL(dgl_ext, CompositeExplicitAutograd, m) {
  m.impl("cuda_device", TORCH_BOX(&cuda_device));
}
STABLE_TORCH_LIBRARY_IMPL(dgl_ext, DGL_EXT_DISPATCH_KEY, m) {
  m.impl("linear_head_forward", TORCH_BOX(&linear_forward));
  m.impl("linear_head_backward", TORCH_BOX(&linear_backward));
  m.impl("film_head_forward", TORCH_BOX(&film_forward));
  m.impl("film_head_backward", TORCH_BOX(&film_backward));
}

}  // namespace dgl_ext

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               "dgl_ext._C_cuda",
                               nullptr,
                               0,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
