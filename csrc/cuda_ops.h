// What the ops on CUDA are made of: a call on its device, its arguments as structs, its results.
//
// Every call runs under the features' device, on the current stream, with its workspace from
// torch's caching allocator, and waits for nothing: it can be captured into a CUDA graph. Where the
// plan says that library GEMMs win, the composed ops (dgl_ext/composed.py) are called instead.

#pragma once

// torch_device.h comes before torch's headers, since it decides what they declare. Angle brackets
// let the tests' emulated build put its own in its place.
#include <cuda/torch_device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
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

// What stands for the address of an input without elements: "there", but never read.
alignas(16) inline char nothing_to_read[16];

inline Dtype dtype_of(const Tensor& tensor) {
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

inline void check(const char* op, cudaError_t status, const char* action) {
  if (status == cudaSuccess) return;
  throw std::runtime_error("dgl_ext::" + std::string(op) + ": " + action + ": CUDA error " +
                           std::to_string(int(status)) + ", " + cudaGetErrorString(status));
}

// Of the GPU that is current and has this index; asked once per GPU.
inline const Device& current_device(const char* op, int32_t index) {
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
    return tensor ? packed(*tensor) : nullptr;
  }

  // Elements one after the other, such as a bias, class indices or a mask.
  const void* packed(const Tensor& tensor) {
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back().numel() == 0 ? nothing_to_read : kept_.back().data_ptr();
  }

  Tensor empty(const Shape& shape, ScalarType dtype) const {
    const torch::stable::Device device(kDeviceType, index_);
    return torch::stable::empty(shape, dtype, std::nullopt, device);
  }
  Tensor empty(const Shape& shape) const { return empty(shape, like_.scalar_type()); }

  // Whether library GEMMs shall run. A caller who wants the kernels only is told if there are none.
  bool goes_composed(const LaunchShape& launch, bool kernel_only) const {
    if (launch.executor == Executor::kFused) return false;
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
    check(op_, launcher(problem, precision, plan, workspace, Queue{stream()}), "launching");
  }
  cudaStream_t stream() const { return current_stream(index_); }

 private:
  const char* op_;
  const Tensor& like_;
  const int32_t index_;
  const DeviceGuard guard_;
  std::vector<Tensor> kept_;
};

// The kernels' view of a row-major result; null where it has no elements to write.
inline Matrix result_rows(const Tensor& tensor) {
  return {tensor.numel() == 0 ? nullptr : tensor.data_ptr(), tensor.size(tensor.dim() - 1)};
}

inline const void* at_column(const void* data, int64_t column, Dtype dtype) {
  return static_cast<const char*>(data) + column * element_size(dtype);
}
inline void* at_column(void* data, int64_t column, Dtype dtype) {
  return data ? static_cast<char*>(data) + column * element_size(dtype) : nullptr;
}

template <class T>
StableIValue boxed(const T& value) {
  return torch::stable::detail::from(value);
}
// A vector<bool> has no array inside for the list to be made from.
inline StableIValue boxed(const std::vector<bool>& values) {
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

inline LinearArguments parse_linear(const Checks& checks, Call& call,
                                    const std::vector<Tensor>& features,
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

inline FilmHead parse_film(const Checks& checks, Call& call, const std::vector<Tensor>& features,
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

}  // namespace dgl_ext
