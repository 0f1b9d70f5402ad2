#include "cuda/kernels/instances.cuh"
#include "cuda/kernels/linear_step.cuh"
#include "cuda/launchers/launch.h"
#include "cuda/library/library.h"

namespace dgl_ext {

cudaError_t linear_head_step(const LinearHeadStep& problem, Precision precision,
                             const LinearStepPlan& plan, void* workspace, const Queue& queue) {
  LinearHeadForward forward;
  forward.head = problem.head;
  LinearStepArguments arguments{{forward, plan.forward, workspace},
                                {problem, plan.backward, workspace},
                                {problem.loss, plan.step, problem.head, workspace}};
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
