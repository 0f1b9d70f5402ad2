// What the ops on CUDA are made of: a call on its device, its arguments as structs, its results.
//
// Every call runs under the features' device, on the current stream, with its workspace from
// torch's caching allocator, and waits for nothing: it can be captured into a CUDA graph.

#pragma once

// torch_device.h comes before torch's headers, since it decides what they declare. Angle brackets
// let the tests' emulated build put its own in its place.
#include <cuda/binding/torch_device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <iostream>
#include <map>
#include <mutex>
#include <set>
#include <sstream>

#include "common/checks.h"
#include "common/torch_errors.h"
#include "cuda/launchers/launch.h"
#include "cuda/plan/plan.h"
#include "cuda/plan/plan_text.h"

namespace dgl_ext {

// What stands for the address of an input without elements: "there", but never read.
alignas(16) inline char nothing_to_read[16];

inline Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
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

// What plans know of each GPU, by its index. Asked once, and again where a launch no longer fits.
class Devices {
 public:
  Device get(const char* op, int32_t index) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = known_.find(index);
    return found != known_.end() ? found->second : ask(op, index);
  }
  Device ask_again(const char* op, int32_t index) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return ask(op, index);
  }

 private:
  Device ask(const char* op, int32_t index) {
    Device device;
    check(op, query_device(&device), "asking the GPU for its properties");
    // Leaves multiprocessors to others, such as NCCL's kernels.
    if (const char* bound = std::getenv("DGL_EXT_MAX_CTAS")) {
      char* end = nullptr;
      const long value = std::strtol(bound, &end, 10);
      if (value < 1 || value > INT_MAX || *end != '\0') {
        throw std::runtime_error("DGL_EXT_MAX_CTAS: expected a positive int, got \"" +
                                 std::string(bound) + "\"");
      }
      device.max_ctas = static_cast<int>(value);
    }
    return known_[index] = device;
  }

  std::mutex mutex_;
  std::map<int32_t, Device> known_;
};
inline Devices& devices() {
  static Devices all;
  return all;
}

// What DGL_EXT_LOG=plan prints, a line for each new one.
inline void log_plan(const std::string& line) {
  static const bool wanted = [] {
    const char* value = std::getenv("DGL_EXT_LOG");
    return value && std::string(value) == "plan";
  }();
  if (!wanted) return;
  static std::mutex mutex;
  static std::set<std::string> seen;
  const std::lock_guard<std::mutex> lock(mutex);
  if (seen.insert(line).second) std::cerr << line << std::endl;
}

// One call: its device, its stream, and what it must keep alive until the launch is queued.
class Call {
 public:
  Call(const char* op, const Tensor& like)
      : op_(op), index_(like.get_device_index()), guard_(index_) {}

  // (..., D) with contiguous columns and one row stride that is no less than a row, as the library
  // needs it; a copy where the tensor is not like that.
  ConstMatrix matrix(const Tensor& tensor) {
    const int64_t columns = tensor.size(tensor.dim() - 1);
    if (tensor.numel() == 0) return {nothing_to_read, columns};
    const bool contiguous_columns = columns == 1 || tensor.stride(tensor.dim() - 1) == 1;
    if (const auto stride = single_row_stride(tensor);
        stride && contiguous_columns && *stride >= columns) {
      return {tensor.const_data_ptr(), *stride};
    }
    kept_.push_back(torch::stable::contiguous(tensor));
    return {kept_.back().const_data_ptr(), columns};
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
    return kept_.back().numel() == 0 ? nothing_to_read : kept_.back().const_data_ptr();
  }

  Tensor empty(const Shape& shape, ScalarType dtype) const {
    const torch::stable::Device device(kDeviceType, index_);
    return torch::stable::empty(shape, dtype, std::nullopt, device);
  }

  Device device() const { return devices().get(op_, index_); }

  // Plans and launches. A cooperative launch may no longer fit (multiprocessors were taken away, by
  // MPS or a green context): then the GPU is asked again, and in the end the library does it.
  template <class Planner, class Launcher, class Problem, class... Limit>
  void run(Planner planner, Launcher launcher, const Problem& problem, Precision precision,
           int64_t executor, Limit... limit) {
    PlanRequest request;
    if (executor != 0) request.executor = executor == 2 ? Executor::kLibrary : Executor::kFused;
    cudaError_t status = launch(planner, launcher, problem, precision, device(), request, limit...);
    if (status == cudaErrorCooperativeLaunchTooLarge) {
      cudaGetLastError();  // it has been dealt with
      const Device now = devices().ask_again(op_, index_);
      status = launch(planner, launcher, problem, precision, now, request, limit...);
    }
    if (status == cudaErrorCooperativeLaunchTooLarge) {
      cudaGetLastError();
      request.executor = Executor::kLibrary;
      status = launch(planner, launcher, problem, precision, device(), request, limit...);
    }
    check(op_, status, "launching");
  }
  cudaStream_t stream() const { return current_stream(index_); }

 private:
  template <class Planner, class Launcher, class Problem, class... Limit>
  cudaError_t launch(Planner planner, Launcher launcher, const Problem& problem,
                     Precision precision, const Device& device, const PlanRequest& request,
                     Limit... limit) {
    const auto plan = planner(problem, precision, device, limit..., request);
    if (plan.launch.executor == Executor::kNone) {
      throw std::runtime_error("dgl_ext::" + std::string(op_) +
                               ": expected a GPU of compute capability 8.0 or more, got " +
                               std::to_string(device.capability / 10) + "." +
                               std::to_string(device.capability % 10));
    }
    log_plan("dgl_ext::" + std::string(op_) + " " + describe(problem.head) + ": " + describe(plan));
    const int64_t bytes = plan.launch.workspace_bytes;
    if (bytes > 0) kept_.push_back(empty({bytes}, ScalarType::Byte));
    void* workspace = bytes > 0 ? kept_.back().data_ptr() : nullptr;
    Queue queue{stream()};
    if (plan.launch.executor == Executor::kLibrary) queue.blas = blas_handle();
    return launcher(problem, precision, plan, workspace, queue);
  }

  const char* op_;
  const int32_t index_;
  const DeviceGuard guard_;
  std::vector<Tensor> kept_;
};

// The kernels' view of a row-major result; null where it has no elements to write.
inline Matrix result_rows(const Tensor& tensor) {
  return {tensor.numel() == 0 ? nullptr : tensor.data_ptr(), tensor.size(tensor.dim() - 1)};
}

// What an op returns, in order, as the kernels' view of it.
class Results {
 public:
  Results(const Call& call, ScalarType gradients) : call_(call), gradients_(gradients) {}

  Tensor& add(const Shape& shape, ScalarType dtype) {
    tensors.push_back(call_.empty(shape, dtype));
    return tensors.back();
  }
  int64_t* add_indices(const Shape& shape) {
    return static_cast<int64_t*>(add(shape, ScalarType::Long).data_ptr());
  }
  // A gradient, where it is asked for; where nothing flows into it, zeros that nobody writes.
  Matrix gradient(bool needed, const Shape& shape, bool flows) {
    if (!needed) return {};
    Tensor& result = add(shape, gradients_);
    if (flows) return result_rows(result);
    torch::stable::zero_(result);
    return {};
  }
  Dtype dtype() const { return dtype_of(gradients_); }
  // Has two results of one shape, the last ones, lie in memory as `ascending` says, so that the
  // library writes both in one call. Both are fresh: either can be either.
  void order_pair(Matrix& first, Matrix& second, bool ascending) {
    if (!first.data || !second.data || (first.data < second.data) == ascending) return;
    std::swap(first, second);
    std::swap(tensors[tensors.size() - 2], tensors.back());
  }

  std::vector<Tensor> tensors;

 private:
  const Call& call_;
  const ScalarType gradients_;
};

template <class Head>
void set_masks(Call& call, const OptionalTensors& present, Head& head) {
  for (size_t i = 0; i < present.size(); ++i) {
    head.present[i] = static_cast<const uint8_t*>(call.vector(present[i]));
  }
}

// ---- concat and sum ----

// Backward has no biases.
inline void set_head(Call& call, const LinearSizes& sizes, const std::vector<Tensor>& features,
                     const std::vector<Tensor>& weights, const OptionalTensors& biases,
                     const OptionalTensors& present, LinearHead& head) {
  head.rows = sizes.rows;
  head.classes = sizes.classes;
  head.modalities = static_cast<int>(features.size());
  ConstMatrix weight;
  for (int i = 0; i < head.modalities; ++i) {
    head.width[i] = features[i].size(features[i].dim() - 1);
    head.feature[i] = call.matrix(features[i]);
    if (i == 0 || !sizes.shared) weight = call.matrix(weights[i]);
    head.weight[i] = moved(weight, sizes.begin[i], dtype_of(features[0].scalar_type()));
    if (!biases.empty()) head.branch_bias[i] = call.vector(biases[sizes.shared ? 0 : i]);
  }
  if (sizes.shared) head.fused_bias = head.branch_bias[0];
  set_masks(call, present, head);
}

// Makes the gradients that are asked for. In a step something flows into each; else concat's weight
// may be reached in part.
inline void make_gradients(Results& results, const LinearSizes& sizes,
                           const std::vector<Tensor>& features, const std::vector<Tensor>& weights,
                           const Needs& needs, bool in_step, LinearHeadBackward& p) {
  for (int i = 0; i < p.head.modalities; ++i) {
    p.grad_feature[i] =
        results.gradient(needs.features[i], shape_of(features[i]), in_step || feature_flows(p, i));
  }
  const bool pair = features.size() == 2 && shape_of(features[0]) == shape_of(features[1]);
  if (pair && in_step) {
    results.order_pair(p.grad_feature[0], p.grad_feature[1],
                       p.head.weight[0].data < p.head.weight[1].data);
  }
  for (size_t w = 0; w < weights.size(); ++w) {
    const int first = sizes.shared ? 0 : static_cast<int>(w);
    const int last = sizes.shared ? p.head.modalities : first + 1;
    const Matrix grad = results.gradient(needs.weights[w], shape_of(weights[w]), true);
    bool whole = true;
    for (int i = first; i < last && grad.data; ++i) {
      if (p.head.width[i] == 0) continue;
      if (in_step || weight_flows(p, i)) {
        p.grad_weight[i] = moved(grad, sizes.begin[i], results.dtype());
      } else {
        whole = false;
      }
    }
    if (!whole) torch::stable::zero_(results.tensors.back());
  }
  if (pair && in_step && !sizes.shared)
    results.order_pair(p.grad_weight[0], p.grad_weight[1], true);
  for (size_t b = 0; b < weights.size(); ++b) {
    const bool flows =
        in_step || (sizes.shared ? fused_bias_flows(p) : weight_flows(p, static_cast<int>(b)));
    void*& grad = sizes.shared ? p.grad_fused_bias : p.grad_branch_bias[b];
    grad = results.gradient(needs.biases[b], {sizes.classes}, flows).data;
  }
}

// ---- FiLM ----

inline void set_head(Call& call, const FilmSizes& sizes, const std::vector<Tensor>& features,
                     const std::vector<Tensor>& weights, const OptionalTensors& biases,
                     const OptionalTensors& present, FilmHead& head) {
  head.rows = sizes.rows;
  head.condition_width = features[0].size(features[0].dim() - 1);
  head.hidden = sizes.hidden;
  head.classes = sizes.classes;
  head.condition = call.matrix(features[0]);
  head.target = call.matrix(features[1]);
  head.film_weight = call.matrix(weights[0]);
  head.out_weight = call.matrix(weights[1]);
  head.film_bias = call.vector(biases[0]);
  head.out_bias = call.vector(biases[1]);
  set_masks(call, present, head);
}

// As for the linear head.
inline void make_gradients(Results& results, const FilmSizes& sizes,
                           const std::vector<Tensor>& features, const std::vector<Tensor>& weights,
                           const Needs& needs, bool in_step, FilmHeadBackward& p) {
  const auto gradient = [&](bool needed, const Shape& shape, bool flows) {
    return results.gradient(needed, shape, in_step || flows);
  };
  const bool flows = parameters_flow(p);
  p.grad_condition = gradient(needs.features[0], shape_of(features[0]), condition_flows(p));
  p.grad_target = gradient(needs.features[1], shape_of(features[1]), target_flows(p));
  p.grad_film_weight = gradient(needs.weights[0], shape_of(weights[0]), film_weight_flows(p));
  p.grad_out_weight = gradient(needs.weights[1], shape_of(weights[1]), flows);
  p.grad_film_bias = gradient(needs.biases[0], {2 * sizes.hidden}, flows).data;
  p.grad_out_bias = gradient(needs.biases[1], {sizes.classes}, flows).data;
}

}  // namespace dgl_ext
