#include "cuda/kernels/instances.cuh"
#include "cuda/kernels/linear_backward.cuh"
#include "cuda/kernels/linear_forward.cuh"
#include "cuda/launchers/launch.h"
#include "cuda/library/library.h"

namespace dgl_ext {

cudaError_t linear_head_forward(const LinearHeadForward& problem, Precision precision,
                                const LinearForwardPlan& plan, void* workspace,
                                const Queue& queue) {
  if (problem.head.rows == 0 || problem.head.classes == 0) return cudaSuccess;
  if (plan.launch.executor == Executor::kLibrary) {
    return library::linear_forward(problem, precision, plan, workspace, queue);
  }
  const LinearForwardArguments arguments{problem, plan, workspace};
  return launch_head<LinearForward>(Configs{}, precision.dtype, plan.launch, arguments,
                                    queue.stream);
}

cudaError_t linear_head_backward(const LinearHeadBackward& problem, Precision precision,
                                 const LinearBackwardPlan& plan, void* workspace,
                                 const Queue& queue) {
  if (plan.launch.executor == Executor::kLibrary) {
    return library::linear_backward(problem, precision, plan, workspace, queue);
  }
  const LinearBackwardArguments arguments{problem, plan, workspace};
  return launch_head<LinearBackward>(Configs{}, precision.dtype, plan.launch, arguments,
                                     queue.stream);
}

cudaError_t linear_head_occupancy(int (&ctas)[kTileCount]) {
  const cudaError_t status = lower_occupancy<LinearForward>(Configs{}, ctas);
  if (status != cudaSuccess) return status;
  return lower_occupancy<LinearBackward>(Configs{}, ctas);
}

}  // namespace dgl_ext
