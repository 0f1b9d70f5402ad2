#include "instances.cuh"
#include "launch.h"
#include "linear_library.h"
#include "linear_step.cuh"

namespace dgl_ext {

cudaError_t linear_head_step(const LinearHeadStep& problem, Precision precision,
                             const LinearStepPlan& plan, void* workspace, const Queue& queue) {
  LinearHeadForward forward;
  forward.head = problem.head;
  forward.fused_bias = problem.fused_bias;
  LinearHeadBackward backward;
  backward.head = problem.head;
  backward.leaks = problem.leaks;
  backward.grad_fused_bias = problem.grad_fused_bias;
  for (int i = 0; i < problem.head.modalities; ++i) {
    forward.branch_bias[i] = problem.branch_bias[i];
    backward.grad_feature[i] = problem.grad_feature[i];
    backward.grad_weight[i] = problem.grad_weight[i];
    backward.grad_branch_bias[i] = problem.grad_branch_bias[i];
  }
  LinearStepArguments arguments{{forward, plan.forward, workspace},
                                {backward, plan.backward, workspace},
                                problem.loss,
                                plan.step};
  arguments.backward.totals_offset = plan.step.totals_offset;
  if (plan.launch.executor == Executor::kLibrary) {
    return library::linear_step(arguments, precision, plan, queue);
  }
  return launch_head<LinearStep>(Configs{}, precision.dtype, plan.launch, arguments, queue.stream);
}

cudaError_t linear_step_occupancy(int (&ctas)[kTileCount]) {
  return lower_occupancy<LinearStep>(Configs{}, ctas);
}

}  // namespace dgl_ext
