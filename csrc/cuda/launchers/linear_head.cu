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
  LinearBackwardArguments arguments{problem, plan, workspace};
  LinearHeadBackward& p = arguments.problem;
  bool work = false;
  // what nothing flows into is dropped here, so that the kernel asks one question only
  for (int i = 0; i < p.head.modalities; ++i) {
    if (!feature_flows(p, i)) p.grad_feature[i].data = nullptr;
    if (!weight_flows(p, i)) p.grad_weight[i].data = p.grad_branch_bias[i] = nullptr;
    work |= p.grad_feature[i].data || p.grad_weight[i].data || p.grad_branch_bias[i];
  }
  if (!fused_bias_flows(p)) p.grad_fused_bias = nullptr;
  if (!work && !p.grad_fused_bias) return cudaSuccess;
  if (plan.launch.executor == Executor::kLibrary) {
    return library::linear_backward(p, precision, plan, workspace, queue);
  }
  return launch_head<LinearBackward>(Configs{}, precision.dtype, plan.launch, arguments,
                                     queue.stream);
}

cudaError_t linear_head_occupancy(int (&ctas)[kTileCount]) {
  const cudaError_t status = lower_occupancy<LinearForward>(Configs{}, ctas);
  if (status != cudaSuccess) return status;
  return lower_occupancy<LinearBackward>(Configs{}, ctas);
}

}  // namespace dgl_ext
