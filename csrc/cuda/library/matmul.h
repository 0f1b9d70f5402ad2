// Matrix products by cuBLAS, on row-major views: what the library executor calls between its
// kernels. Nothing else in the project knows cuBLAS.
#pragma once

#include <cuda_runtime_api.h>

#include "common/problem.h"
#include "cuda/plan/plan.h"

struct cublasContext;

namespace dgl_ext {

/// Where launches and products go: torch's cuBLAS handle has this stream set, and a workspace.
struct Queue {
  cudaStream_t stream = nullptr;
  cublasContext* blas = nullptr;  ///< null where no plan says library
};

/// c (rows, columns) = alpha a b, or c += alpha a b where sums go on over chunks of rows; a is
/// (rows, depth) and b (depth, columns), or stored the other way round where `transposed`. Strides
/// are of the stored rows.
struct Matmul {
  int64_t rows = 0, columns = 0, depth = 0;
  ConstMatrix a;
  bool a_transposed = false;
  ConstMatrix b;
  bool b_transposed = false;
  Matrix c;
  Dtype result = Dtype::kFloat32;  ///< of c; a and b have the dtype of the problem
  bool accumulate = false;
  double alpha = 1;
  /// Where alpha is known on the device only: a scale there. Products that take the same one may
  /// run together.
  const StepTotals* scale = nullptr;
};

/// Computes products of one dtype, one after the other. Neighbours of one shape whose operands lie
/// at equal distances go to the library as one call. `constants`: two scales on the device, 1 and
/// 0; read only where a product has a scale. Throws std::runtime_error where cuBLAS fails.
cudaError_t matmul(const Queue& queue, Precision precision, const StepTotals* constants,
                   const Matmul* products, int count);

}  // namespace dgl_ext
