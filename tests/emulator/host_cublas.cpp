// cuBLAS on the host, column-major as NVIDIA documents it. Every call is one launch of the emulator
// whose first thread computes: its accesses are checked like a kernel's, and it is counted.
#include <cublas_v2.h>

#include <vector>

#include "device_language.h"
#include "host_products.h"

struct cublasContext {
  cublasPointerMode_t mode = CUBLAS_POINTER_MODE_HOST;
};

namespace {

cublasContext context_of_all;

// matmul.h knows no handle here: a null one stands for this.
cublasContext& context_of(cublasHandle_t handle) { return handle ? *handle : context_of_all; }

double load(const void* data, cudaDataType_t type, int64_t i) {
  switch (type) {
    case CUDA_R_64F:
      return static_cast<const double*>(data)[i];
    case CUDA_R_32F:
      return static_cast<const float*>(data)[i];
    case CUDA_R_16BF:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    default:
      return __half2float(static_cast<const __half*>(data)[i]);
  }
}
void store(void* data, cudaDataType_t type, int64_t i, double v) {
  switch (type) {
    case CUDA_R_64F:
      static_cast<double*>(data)[i] = v;
      return;
    case CUDA_R_32F:
      static_cast<float*>(data)[i] = float(v);
      return;
    case CUDA_R_16BF:
      static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(float(v));
      return;
    default:
      static_cast<__half*>(data)[i] = __float2half_rn(float(v));
  }
}

struct Operand {
  const void* data;
  cudaDataType_t type;
  int64_t lead, stride;
  cublasOperation_t op;

  // rows x columns of op(matrix), as doubles, row after row
  std::vector<double> read(int64_t rows, int64_t columns, int64_t batch, bool tf32) const {
    std::vector<double> values(rows * columns);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at = op == CUBLAS_OP_N ? j * lead + i : i * lead + j;
        const double v = load(data, type, batch * stride + at);
        values[i * columns + j] = tf32 ? emulator::rounded_to_tf32(float(v)) : v;
      }
    }
    return values;
  }
};

bool fits(cudaDataType_t operands, cudaDataType_t result, cublasComputeType_t compute) {
  if (compute == CUBLAS_COMPUTE_64F) return operands == CUDA_R_64F && result == CUDA_R_64F;
  if (operands == CUDA_R_64F || result == CUDA_R_64F) return false;
  if (compute == CUBLAS_COMPUTE_32F_FAST_TF32 && operands != CUDA_R_32F) return false;
  return result == CUDA_R_32F || result == operands;
}

cublasStatus_t multiply(cublasHandle_t handle, int64_t m, int64_t n, int64_t k, const void* alpha,
                        const Operand& a, const Operand& b, const void* beta, void* c,
                        cudaDataType_t c_type, int64_t ldc, int64_t stride_c, int64_t count,
                        cublasComputeType_t compute) {
  const int64_t a_rows = a.op == CUBLAS_OP_N ? m : k, b_rows = b.op == CUBLAS_OP_N ? k : n;
  if (m < 0 || n < 0 || k < 0 || count < 0) return CUBLAS_STATUS_INVALID_VALUE;
  if (a.lead < std::max<int64_t>(1, a_rows) || b.lead < std::max<int64_t>(1, b_rows) ||
      ldc < std::max<int64_t>(1, m)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  // nothing is documented of negative strides: matmul.h promises none
  if (a.stride < 0 || b.stride < 0 || stride_c < 0) return CUBLAS_STATUS_INVALID_VALUE;
  if (a.type != b.type || !fits(a.type, c_type, compute)) return CUBLAS_STATUS_NOT_SUPPORTED;
  const bool wide = compute == CUBLAS_COMPUTE_64F, tf32 = compute == CUBLAS_COMPUTE_32F_FAST_TF32;
  const bool on_device = context_of(handle).mode == CUBLAS_POINTER_MODE_DEVICE;
  const auto scalar = [&](const void* p) { return load(p, wide ? CUDA_R_64F : CUDA_R_32F, 0); };
  double scale = on_device ? 0 : scalar(alpha), keep = on_device ? 0 : scalar(beta);
  ++emulator::statistics().matmuls;
  emulator::launch(dim3{1}, dim3{32}, 0, false, [&] {
    if (threadIdx.x != 0) return;
    if (on_device) {
      scale = scalar(alpha);
      keep = scalar(beta);
    }
    for (int64_t batch = 0; batch < count; ++batch) {
      const std::vector<double> product =
          emulator::product(a.read(m, k, batch, tf32), b.read(k, n, batch, tf32), m, n, k);
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = 0; i < m; ++i) {
          const int64_t at = batch * stride_c + j * ldc + i;
          double v = scale * product[i * n + j];
          if (keep != 0) v += keep * load(c, c_type, at);
          store(c, c_type, at, v);
        }
      }
    }
  });
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

const char* cublasGetStatusString(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "success";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "invalid value";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "not supported";
    default:
      return "not initialized";
  }
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t* mode) {
  *mode = context_of(handle).mode;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
  context_of(handle).mode = mode;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmEx_64(cublasHandle_t handle, cublasOperation_t op_a,
                               cublasOperation_t op_b, int64_t m, int64_t n, int64_t k,
                               const void* alpha, const void* a, cudaDataType_t a_type, int64_t lda,
                               const void* b, cudaDataType_t b_type, int64_t ldb, const void* beta,
                               void* c, cudaDataType_t c_type, int64_t ldc,
                               cublasComputeType_t compute, cublasGemmAlgo_t) {
  return multiply(handle, m, n, k, alpha, {a, a_type, lda, 0, op_a}, {b, b_type, ldb, 0, op_b},
                  beta, c, c_type, ldc, 0, 1, compute);
}
cublasStatus_t cublasGemmStridedBatchedEx_64(
    cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int64_t m, int64_t n,
    int64_t k, const void* alpha, const void* a, cudaDataType_t a_type, int64_t lda,
    int64_t stride_a, const void* b, cudaDataType_t b_type, int64_t ldb, int64_t stride_b,
    const void* beta, void* c, cudaDataType_t c_type, int64_t ldc, int64_t stride_c, int64_t count,
    cublasComputeType_t compute, cublasGemmAlgo_t) {
  return multiply(handle, m, n, k, alpha, {a, a_type, lda, stride_a, op_a},
                  {b, b_type, ldb, stride_b, op_b}, beta, c, c_type, ldc, stride_c, count, compute);
}
