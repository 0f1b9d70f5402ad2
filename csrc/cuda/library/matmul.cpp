#include "cuda/library/matmul.h"

#include <cublas_v2.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

namespace dgl_ext {
namespace {

cudaDataType_t data_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return CUDA_R_64F;
    case Dtype::kFloat32:
      return CUDA_R_32F;
    case Dtype::kBFloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_16F;
  }
}

/// 16-bit operands are multiplied exactly and summed in float32; tf32 only where it is allowed.
cublasComputeType_t compute_type(Precision precision) {
  if (precision.dtype == Dtype::kFloat64) return CUBLAS_COMPUTE_64F;
  const bool tf32 = precision.dtype == Dtype::kFloat32 && precision.allow_tf32;
  return tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
}

void check(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error(std::string(call) + ": " + cublasGetStatusString(status));
}

/// Scales are read on the device while one of these lives.
class DevicePointers {
 public:
  explicit DevicePointers(cublasHandle_t handle) : handle_(handle) {
    check(cublasGetPointerMode(handle_, &before_), "cublasGetPointerMode");
    check(cublasSetPointerMode(handle_, CUBLAS_POINTER_MODE_DEVICE), "cublasSetPointerMode");
  }
  ~DevicePointers() { cublasSetPointerMode(handle_, before_); }
  DevicePointers(const DevicePointers&) = delete;
  DevicePointers& operator=(const DevicePointers&) = delete;

 private:
  cublasHandle_t handle_;
  cublasPointerMode_t before_;
};

/// What the operands' addresses grow by from one product of a batch to the next, in elements.
struct Steps {
  int64_t a = 0, b = 0, c = 0;
  bool operator==(const Steps& other) const { return a == other.a && b == other.b && c == other.c; }
};

int64_t distance(const void* from, const void* to, Dtype dtype) {
  const int64_t bytes = reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from);
  // the library documents strides between operands, and nothing of negative ones
  return bytes >= 0 && bytes % element_size(dtype) == 0 ? bytes / element_size(dtype) : -1;
}
Steps steps(const Matmul& p, const Matmul& q, Dtype dtype) {
  return {distance(p.a.data, q.a.data, dtype), distance(p.b.data, q.b.data, dtype),
          distance(p.c.data, q.c.data, p.result)};
}
bool same_shape(const Matmul& p, const Matmul& q) {
  return p.rows == q.rows && p.columns == q.columns && p.depth == q.depth &&
         p.a.stride == q.a.stride && p.b.stride == q.b.stride && p.c.stride == q.c.stride &&
         p.a_transposed == q.a_transposed && p.b_transposed == q.b_transposed &&
         p.result == q.result && p.accumulate == q.accumulate && p.alpha == q.alpha &&
         p.scale == q.scale;
}

/// Leading dimension of a stored matrix; of a single row any stride is as good, but not to cuBLAS.
int64_t leading(int64_t stride, int64_t rows, int64_t columns) {
  return rows <= 1 ? std::max<int64_t>(columns, 1) : stride;
}

/// `count` products as one call. Row-major c = a b is c^T = b^T a^T to the library, whose matrices
/// are column-major: operands change places, and nothing is transposed.
void multiply(cublasHandle_t handle, Precision precision, const StepTotals* constants,
              const Matmul& p, int count, const Steps& step) {
  const bool wide = precision.dtype == Dtype::kFloat64;
  const float alpha = float(p.alpha), beta = p.accumulate ? 1.f : 0.f;
  const double wide_alpha = p.alpha, wide_beta = beta;
  const void* scale = wide ? static_cast<const void*>(&wide_alpha) : &alpha;
  const void* keep = wide ? static_cast<const void*>(&wide_beta) : &beta;
  if (p.scale) {
    const StepTotals* kept = p.accumulate ? constants : constants + 1;
    scale = wide ? static_cast<const void*>(&p.scale->scale) : &p.scale->scale32;
    keep = wide ? static_cast<const void*>(&kept->scale) : &kept->scale32;
  }
  const cudaDataType_t type = data_type(precision.dtype), result = data_type(p.result);
  const cublasOperation_t first = p.b_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasOperation_t second = p.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
  const int64_t lead_a =
      p.a_transposed ? leading(p.a.stride, p.depth, p.rows) : leading(p.a.stride, p.rows, p.depth);
  const int64_t lead_b = p.b_transposed ? leading(p.b.stride, p.columns, p.depth)
                                        : leading(p.b.stride, p.depth, p.columns);
  const int64_t lead_c = leading(p.c.stride, p.rows, p.columns);
  const cublasComputeType_t compute = compute_type(precision);
  if (count == 1) {
    check(cublasGemmEx_64(handle, first, second, p.columns, p.rows, p.depth, scale, p.b.data, type,
                          lead_b, p.a.data, type, lead_a, keep, p.c.data, result, lead_c, compute,
                          CUBLAS_GEMM_DEFAULT),
          "cublasGemmEx");
    return;
  }
  check(cublasGemmStridedBatchedEx_64(handle, first, second, p.columns, p.rows, p.depth, scale,
                                      p.b.data, type, lead_b, step.b, p.a.data, type, lead_a,
                                      step.a, keep, p.c.data, result, lead_c, step.c, count,
                                      compute, CUBLAS_GEMM_DEFAULT),
        "cublasGemmStridedBatchedEx");
}

}  // namespace

cudaError_t matmul(const Queue& queue, Precision precision, const StepTotals* constants,
                   const Matmul* products, int count) {
  cublasHandle_t handle = queue.blas;
  for (int i = 0; i < count;) {
    const Matmul& p = products[i];
    int together = 1;
    Steps step;
    if (p.rows == 0 || p.columns == 0) {
      ++i;
      continue;
    }
    if (p.depth == 0) {  // a sum of nothing
      if (!p.accumulate) {
        const size_t item = element_size(p.result);
        const cudaError_t status = cudaMemset2DAsync(p.c.data, p.c.stride * item, 0,
                                                     p.columns * item, p.rows, queue.stream);
        if (status != cudaSuccess) return status;
      }
      ++i;
      continue;
    }
    if (i + 1 < count) step = steps(p, products[i + 1], precision.dtype);
    while (i + together < count && same_shape(p, products[i + together]) &&
           steps(products[i + together - 1], products[i + together], precision.dtype) == step &&
           step.a >= 0 && step.b >= 0 && step.c > 0) {
      ++together;
    }
    const Matmul* first = &p;
    if (together == 1 && i + 1 < count && same_shape(p, products[i + 1])) {
      // two whose operands all lie the other way round run from the other end
      const Steps back = steps(products[i + 1], p, precision.dtype);
      if (back.a >= 0 && back.b >= 0 && back.c > 0) {
        first = &products[i + 1];
        step = back;
        together = 2;
      }
    }
    std::optional<DevicePointers> scope;
    if (p.scale) scope.emplace(handle);
    multiply(handle, precision, constants, *first, together, step);
    i += together;
  }
  return cudaSuccess;
}

}  // namespace dgl_ext
