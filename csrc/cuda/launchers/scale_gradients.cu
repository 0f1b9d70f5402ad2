// A step's gradients times the gradient of its total, which is known on the device only. Zero stays
// zero, times infinity and NaN too: rows that are absent or ignored have no gradient.
#include "cuda/kernels/intrinsics.cuh"
#include "cuda/launchers/launch.h"

namespace dgl_ext {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlock = 16 * kThreads;  ///< elements of one work item

template <class From, class To>
struct ScaleArguments {
  ScaledGradients problem;
  int64_t items;
};

template <class From, class To>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const __grid_constant__ ScaleArguments<From, To> args) {
  using Accumulator = accumulator_t<From>;
  const ScaledGradients& p = args.problem;
  const Accumulator scale = *static_cast<const Accumulator*>(p.scale);
  if (p.from[0] == p.to[0] && scale == Accumulator(1)) return;  // in place: nothing changes
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < args.items; item += gridDim.x) {
    int i = 0;
    int64_t block = item;
    for (; block >= ceil_div(p.size[i], kBlock); ++i) block -= ceil_div(p.size[i], kBlock);
    const auto* from = static_cast<const From*>(p.from[i]);
    auto* to = static_cast<To*>(p.to[i]);
    const int64_t end = smaller((block + 1) * kBlock, p.size[i]);
#pragma unroll 4
    for (int64_t at = block * kBlock + threadIdx.x; at < end; at += kThreads) {
      const Accumulator value = widen(from[at]);
      to[at] = narrow<To>(value == Accumulator(0) ? value : value * scale);
    }
  }
}

template <class From, class To>
cudaError_t launch(const ScaledGradients& problem, int grid_limit, cudaStream_t stream) {
  ScaleArguments<From, To> arguments{problem, 0};
  for (int i = 0; i < problem.count; ++i) arguments.items += ceil_div(problem.size[i], kBlock);
  if (arguments.items == 0) return cudaSuccess;
  const int grid = int(smaller(arguments.items, grid_limit));
  return launch_kernel<ScaleArguments<From, To>>(&scale_kernel<From, To>, grid, kThreads, 0, false,
                                                 arguments, stream);
}

}  // namespace

cudaError_t scale_gradients(const ScaledGradients& problem, const Device& device,
                            cudaStream_t stream) {
  int grid_limit = 4 * (device.multiprocessors > 0 ? device.multiprocessors : 1);
  if (device.max_ctas > 0) grid_limit = int(smaller(grid_limit, device.max_ctas));
  switch (problem.dtype) {
    case Dtype::kFloat64:
      return launch<double, double>(problem, grid_limit, stream);
    case Dtype::kFloat32:
      return problem.to_float16 ? launch<float, f16>(problem, grid_limit, stream)
                                : launch<float, float>(problem, grid_limit, stream);
    case Dtype::kBFloat16:
      return launch<bf16, bf16>(problem, grid_limit, stream);
    default:
      return launch<f16, f16>(problem, grid_limit, stream);
  }
}

}  // namespace dgl_ext
