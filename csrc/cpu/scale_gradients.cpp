// A step's gradients times the gradient of its total, on the CPU. The product is taken in float32
// (float64 for float64 gradients) and rounded once. Zero stays zero, times infinity and NaN too:
// rows that are absent or ignored have no gradient, whatever becomes of the others.

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/matrix.h"

namespace dgl_ext::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// Calls f with a value of the C++ type of a gradient's dtype.
template <typename F>
void dispatch_gradient(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      return f(Half{});
  }
}

template <typename From, typename To>
void scale_into(const Tensor& from, double scale, const Tensor& to) {
  using Compute = std::conditional_t<std::is_same_v<From, double>, double, float>;
  To* out = static_cast<To*>(to.data_ptr());  // first, since it copies what is copied on write
  const From* in = static_cast<const From*>(from.const_data_ptr());
  const Compute factor = static_cast<Compute>(scale);
  parallel_ranges(from.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Compute value = static_cast<Compute>(in[k]);
      out[k] = static_cast<To>(value == 0 ? value : value * factor);
    }
  });
}

double check(const Checks& checks, const std::vector<Tensor>& grads, const Tensor& scale) {
  checks.scaling(grads, scale);
  return scale.scalar_type() == ScalarType::Double
             ? *static_cast<const double*>(scale.const_data_ptr())
             : *static_cast<const float*>(scale.const_data_ptr());
}

void scale_in_place(std::vector<Tensor> grads, Tensor scale) {
  const Checks checks("scale_gradients_");
  const double factor = check(checks, grads, scale);
  if (factor == 1) return;
  for (Tensor& grad : grads) {
    const bool whole = grad.is_contiguous();
    const Tensor values = whole ? grad : torch::stable::contiguous(grad);
    dispatch_gradient(grad.scalar_type(), [&](auto type) {
      using T = decltype(type);
      scale_into<T, T>(values, factor, values);
    });
    if (!whole) torch::stable::copy_(grad, values);
  }
}

std::vector<Tensor> scale_copies(std::vector<Tensor> grads, Tensor scale, bool to_float16) {
  const Checks checks("scale_gradients");
  const double factor = check(checks, grads, scale);
  std::vector<Tensor> results;
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor values = torch::stable::contiguous(grads[i]);
    const ScalarType dtype = values.scalar_type();
    if (to_float16 && dtype != ScalarType::Float) {
      checks.fail(Checks::indexed("grads", i), "float32 to round to float16", dtype_name(dtype));
    }
    results.push_back(empty_cpu(shape_of(values), to_float16 ? ScalarType::Half : dtype));
    if (to_float16) {
      scale_into<float, Half>(values, factor, results.back());
      continue;
    }
    dispatch_gradient(dtype, [&](auto type) {
      using T = decltype(type);
      scale_into<T, T>(values, factor, results.back());
    });
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgl_ext, CPU, m) {
  m.impl("scale_gradients_", DGL_EXT_CPU_OP(&scale_in_place));
  m.impl("scale_gradients", DGL_EXT_CPU_OP(&scale_copies));
}

}  // namespace dgl_ext::cpu
