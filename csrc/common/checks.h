// Shapes of tensors, and checks of what the ops receive, so that bad input is an error and never a
// crash. A plain call from Python has no others (dgl_ext/functional.py); where one fails here,
// Python then says why in the user's terms.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/problem.h"

namespace dgl_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensors = std::vector<std::optional<Tensor>>;

using Shape = std::vector<int64_t>;

inline Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

// How many rows a (..., D) shape has.
inline int64_t leading_count(const Shape& shape) {
  return std::accumulate(shape.begin(), shape.end() - 1, int64_t{1}, std::multiplies<int64_t>());
}

// The one stride that reaches every row of a (..., D) tensor that is not empty, if there is one.
inline std::optional<int64_t> single_row_stride(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t last = tensor.dim() - 1;
  int64_t rows = 1;
  int64_t row_stride = sizes[last];
  for (int64_t d = last - 1; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (rows == 1) {
      row_stride = strides[d];
    } else if (strides[d] != row_stride * rows) {
      return std::nullopt;
    }
    rows *= sizes[d];
  }
  return row_stride;
}

inline std::string to_string(const Shape& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << (shape.size() == 1 ? ",)" : ")");
  return text.str();
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    default:
      return "an unsupported dtype";
  }
}

// Sums, saved intermediates and losses; on the CPU everything but what an op takes and returns.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether features can have this dtype.
inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Float ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// The sizes of a head whose features and weights fit together.
struct HeadSizes {
  Shape leading;
  int64_t rows, classes;

  // `leading` and so many columns.
  Shape with(int64_t columns) const {
    Shape shape = leading;
    shape.push_back(columns);
    return shape;
  }
};
struct LinearSizes : HeadSizes {
  bool shared;                 // one weight and one bias for all modalities
  std::vector<int64_t> begin;  // of each modality's columns in its weight
};
struct FilmSizes : HeadSizes {
  int64_t hidden;
};

// Which gradients are asked for.
struct Needs {
  std::vector<bool> features, weights, biases;

  static bool any(const std::vector<bool>& of) {
    return std::find(of.begin(), of.end(), true) != of.end();
  }
  bool head() const { return any(weights) || any(biases); }
};

// What a step's loss is made of besides logits and numbers.
struct StepInputs {
  Tensor target;  // class indices (...), or floating (..., C)
  std::optional<Tensor> class_weight, sample_weight;
};

// The checks of one op: every message names the op, the argument, what it expects and what it got.
class Checks {
 public:
  explicit Checks(const char* op, bool on_cuda = false, bool has_library = false)
      : op_(op), on_cuda_(on_cuda), has_library_(has_library) {}

  [[noreturn]] void fail(const std::string& argument, const std::string& expected,
                         const std::string& got) const {
    throw std::runtime_error("dgl_ext::" + std::string(op_) + ": " + argument + ": expected " +
                             expected + ", got " + got);
  }

  void length(const char* argument, size_t got, size_t expected) const {
    if (got != expected) {
      fail(argument, std::to_string(expected) + " entries", std::to_string(got));
    }
  }

  void shape(const std::string& argument, const Tensor& tensor, const Shape& expected) const {
    const Shape got = shape_of(tensor);
    if (got != expected) fail(argument, "shape " + to_string(expected), to_string(got));
  }

  // `like` is the first tensor of the op, which `name` names.
  void device(const std::string& argument, const Tensor& tensor, const Tensor& like,
              const std::string& name = "features[0]") const {
    if (on_cuda_ ? !tensor.is_cuda() : !tensor.is_cpu()) {
      fail(argument, on_cuda_ ? "a CUDA tensor" : "a CPU tensor", "a tensor on another device");
    }
    if (on_cuda_ && tensor.get_device_index() != like.get_device_index()) {
      fail(argument, "device cuda:" + std::to_string(like.get_device_index()) + " as " + name,
           "cuda:" + std::to_string(tensor.get_device_index()));
    }
  }

  // The first tensor must be a floating-point tensor on the op's device itself. Other layouts than
  // strided need no check: the dispatcher has no kernel for them.
  void like(const std::string& argument, const Tensor& tensor, const Tensor& like,
            const std::string& name = "features[0]") const {
    device(argument, tensor, like, name);
    const ScalarType dtype = tensor.scalar_type();
    if (!is_floating(dtype)) {
      fail(argument, "float64, float32, bfloat16 or float16", dtype_name(dtype));
    }
    if (dtype != like.scalar_type()) {
      fail(argument, std::string(dtype_name(like.scalar_type())) + " as " + name,
           dtype_name(dtype));
    }
  }

  // concat, where the weight has the modalities' columns side by side, and sum, with a weight each.
  LinearSizes linear(const std::vector<Tensor>& features,
                     const std::vector<Tensor>& weights) const {
    LinearSizes sizes;
    static_cast<HeadSizes&>(sizes) = head(features, 1, kMaxModalities);
    sizes.shared = weights.size() == 1;
    if (!sizes.shared) length("weights", weights.size(), features.size());
    sizes.classes = outputs("weights[0]", weights[0], "shape (C, D)");
    int64_t width = 0;
    for (const Tensor& feature : features) {
      sizes.begin.push_back(sizes.shared ? width : 0);
      width += columns(feature);
    }
    for (size_t w = 0; w < weights.size(); ++w) {
      like(indexed("weights", w), weights[w], features[0]);
      shape(indexed("weights", w), weights[w],
            {sizes.classes, sizes.shared ? width : columns(features[w])});
    }
    return sizes;
  }

  FilmSizes film(const std::vector<Tensor>& features, const std::vector<Tensor>& weights) const {
    FilmSizes sizes;
    static_cast<HeadSizes&>(sizes) = head(features, 2, 2);
    length("weights", weights.size(), 2);
    for (size_t w = 0; w < 2; ++w) like(indexed("weights", w), weights[w], features[0]);
    sizes.hidden = columns(features[1]);
    sizes.classes = outputs("weights[1]", weights[1], "shape (C, H)");
    shape("weights[0]", weights[0], {2 * sizes.hidden, columns(features[0])});
    shape("weights[1]", weights[1], {sizes.classes, sizes.hidden});
    return sizes;
  }

  // Equal leading shapes, one dtype; the classes are yet to be found.
  HeadSizes head(const std::vector<Tensor>& features, int64_t min_count, int64_t max_count) const {
    const auto count = static_cast<int64_t>(features.size());
    if (count < min_count || count > max_count) {
      fail("features", std::to_string(min_count) + " to " + std::to_string(max_count) + " tensors",
           std::to_string(count));
    }
    Shape leading;
    for (size_t i = 0; i < features.size(); ++i) {
      const std::string name = indexed("features", i);
      like(name, features[i], features[0]);
      Shape shape = shape_of(features[i]);
      if (shape.empty()) fail(name, "shape (..., D)", "a scalar");
      shape.pop_back();
      if (i == 0) leading = shape;
      if (shape != leading) {
        fail(name, "leading shape " + to_string(leading) + " as features[0]", to_string(shape));
      }
    }
    return {leading, leading_count(shape_of(features[0])), 0};
  }

  // Each bias there is has one entry per row of its weight.
  void biases(const OptionalTensors& biases, const std::vector<Tensor>& weights,
              const Tensor& like_tensor) const {
    length("biases", biases.size(), weights.size());
    for (size_t i = 0; i < biases.size(); ++i) {
      if (!biases[i]) continue;
      like(indexed("biases", i), *biases[i], like_tensor);
      shape(indexed("biases", i), *biases[i], {weights[i].size(0)});
    }
  }

  void grad_outputs(const OptionalTensors& grads, size_t count, const HeadSizes& sizes,
                    const Tensor& like_tensor) const {
    length("grad_outputs", grads.size(), count);
    for (size_t i = 0; i < grads.size(); ++i) {
      if (!grads[i]) continue;
      like(indexed("grad_outputs", i), *grads[i], like_tensor);
      shape(indexed("grad_outputs", i), *grads[i], sizes.with(sizes.classes));
    }
  }

  // Of one dtype and shape, such as one int64 or bool per row.
  void of_dtype(const std::string& argument, const Tensor& tensor, ScalarType dtype,
                const Shape& leading, const Tensor& like_tensor,
                const std::string& name = "features[0]") const {
    device(argument, tensor, like_tensor, name);
    if (tensor.scalar_type() != dtype) {
      fail(argument, dtype_name(dtype), dtype_name(tensor.scalar_type()));
    }
    shape(argument, tensor, leading);
  }

  // None at all, or one entry per modality.
  void masks(const OptionalTensors& present, size_t modalities, const Shape& leading,
             const Tensor& like_tensor) const {
    if (!present.empty()) length("present", present.size(), modalities);
    for (size_t i = 0; i < present.size(); ++i) {
      if (!present[i]) continue;
      of_dtype(indexed("present", i), *present[i], ScalarType::Bool, leading, like_tensor);
    }
  }

  // What a step takes besides a head: the target, weights, masks and the loss's numbers.
  void step(const StepInputs& inputs, const OptionalTensors& present,
            const std::vector<double>& alpha, double label_smoothing, int64_t workspace_limit,
            size_t modalities, const HeadSizes& sizes, const Tensor& like_tensor) const {
    const ScalarType loss_dtype = compute_dtype(like_tensor.scalar_type());
    if (is_floating(inputs.target.scalar_type())) {
      device("target", inputs.target, like_tensor);
      shape("target", inputs.target, sizes.with(sizes.classes));
    } else {
      of_dtype("target", inputs.target, ScalarType::Long, sizes.leading, like_tensor);
    }
    if (inputs.class_weight) {
      of_dtype("class_weight", *inputs.class_weight, loss_dtype, {sizes.classes}, like_tensor);
    }
    if (inputs.sample_weight) {
      of_dtype("sample_weight", *inputs.sample_weight, loss_dtype, sizes.leading, like_tensor);
    }
    masks(present, modalities, sizes.leading, like_tensor);
    length("alpha", alpha.size(), modalities);
    for (size_t i = 0; i < alpha.size(); ++i) {
      if (!std::isfinite(alpha[i])) {
        fail(indexed("alpha", i), "a finite number", std::to_string(alpha[i]));
      }
    }
    share("label_smoothing", label_smoothing);
    if (workspace_limit < 0) {
      fail("workspace_limit", "a number of bytes, or 0", std::to_string(workspace_limit));
    }
  }

  void share(const char* argument, double value) const {
    if (!(value >= 0 && value <= 1)) fail(argument, "a number in [0, 1]", std::to_string(value));
  }

  // Which gradients are asked for, and how much leaks into them.
  void needs(const Needs& needs, double encoder_leak, double head_leak, size_t modalities,
             size_t parameters) const {
    share("encoder_leak", encoder_leak);
    share("head_leak", head_leak);
    length("needs_features", needs.features.size(), modalities);
    length("needs_weights", needs.weights.size(), parameters);
    length("needs_biases", needs.biases.size(), parameters);
  }

  // A step's gradients, and that of its total, which they are to be multiplied by.
  void scaling(const std::vector<Tensor>& grads, const Tensor& scale) const {
    for (size_t i = 0; i < grads.size(); ++i) {
      like(indexed("grads", i), grads[i], grads[0], "grads[0]");
    }
    const Tensor& first = grads.empty() ? scale : grads[0];
    of_dtype("scale", scale, grads.empty() ? ScalarType::Float : compute_dtype(first.scalar_type()),
             {}, first, "grads[0]");
  }

  // 0: as the plan says, 1: this project's products, 2: the library's.
  void executor(int64_t executor) const {
    if (executor < 0 || executor > (has_library_ ? 2 : 1)) {
      fail("executor", has_library_ ? "0, 1 or 2" : "0 or 1 on the CPU", std::to_string(executor));
    }
  }

  static std::string indexed(const char* argument, size_t i) {
    return std::string(argument) + "[" + std::to_string(i) + "]";
  }

 private:
  static int64_t columns(const Tensor& tensor) { return tensor.size(tensor.dim() - 1); }

  // How many rows a weight has whose rows are outputs.
  int64_t outputs(const char* argument, const Tensor& weight, const char* expected) const {
    if (weight.dim() != 2) fail(argument, expected, to_string(shape_of(weight)));
    return weight.size(0);
  }

  const char* op_;
  bool on_cuda_, has_library_;
};

}  // namespace dgl_ext
