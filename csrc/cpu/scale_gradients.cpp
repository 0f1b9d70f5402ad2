// A step's gradients times the gradient of its total, on the CPU. The product is taken in float32
// (float64 for float64 gradients) and rounded once. Zero stays zero, times infinity and NaN too:
// rows that are absent or ignored have no gradient, whatever becomes of the others.

#include <torch/csrc/stable/library.h>

#include "cpu/matrix.h"

namespace dgl_ext::cpu {
namespace {

// Both are contiguous and of a compute dtype; they may be the same tensor.
void scale_into(const Tensor& from, double scale, const Tensor& to) {
  dispatch_dtype(from.scalar_type(), [&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(to.data_ptr());  // first, since it copies what is copied on write
    const T* in = static_cast<const T*>(from.const_data_ptr());
    const T factor = static_cast<T>(scale);
    parallel_ranges(from.numel(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) out[k] = in[k] == 0 ? in[k] : in[k] * factor;
    });
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
    const Tensor values = to_contiguous(to_compute(grad));
    scale_into(values, factor, values);
    if (values.const_data_ptr() != grad.const_data_ptr()) torch::stable::copy_(grad, values);
  }
}

std::vector<Tensor> scale_copies(std::vector<Tensor> grads, Tensor scale, bool to_float16) {
  const Checks checks("scale_gradients");
  const double factor = check(checks, grads, scale);
  std::vector<Tensor> results;
  for (size_t i = 0; i < grads.size(); ++i) {
    const ScalarType dtype = grads[i].scalar_type();
    if (to_float16 && dtype != ScalarType::Float) {
      checks.fail(Checks::indexed("grads", i), "float32 to round to float16", dtype_name(dtype));
    }
    const Tensor values = to_contiguous(to_compute(grads[i]));
    const Tensor result = empty_cpu(shape_of(values), values.scalar_type());
    scale_into(values, factor, result);
    results.push_back(to_dtype(result, to_float16 ? ScalarType::Half : dtype));
  }
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dgl_ext, CPU, m) {
  m.impl("scale_gradients_", DGL_EXT_CPU_OP(&scale_in_place));
  m.impl("scale_gradients", DGL_EXT_CPU_OP(&scale_copies));
}

}  // namespace dgl_ext::cpu
