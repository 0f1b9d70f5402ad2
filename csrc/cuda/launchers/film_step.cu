#include "cuda/kernels/film_step.cuh"
#include "cuda/kernels/instances.cuh"
#include "cuda/launchers/launch.h"
#include "cuda/library/library.h"

namespace dgl_ext {

cudaError_t film_head_step(const FilmHeadStep& problem, Precision precision,
                           const FilmStepPlan& plan, void* workspace, const Queue& queue) {
  FilmHeadForward forward;
  forward.head = problem.head;
  forward.modulation = {static_cast<char*>(workspace) + plan.modulation_offset,
                        2 * problem.head.hidden};
  FilmHeadBackward backward = problem;
  backward.modulation = {forward.modulation.data, forward.modulation.stride};
  FilmStepArguments arguments{{forward, plan.forward, workspace},
                              {backward, plan.backward, workspace},
                              {problem.loss, plan.step, problem.head, workspace}};
  arguments.backward.totals_offset = plan.step.totals_offset;
  if (plan.launch.executor == Executor::kLibrary) {
    return library::film_step(arguments, precision, plan, queue);
  }
  return launch_head<FilmStep>(Configs{}, precision.dtype, plan.launch, arguments, queue.stream);
}

cudaError_t film_step_occupancy(int (&ctas)[kTileCount]) {
  return lower_occupancy<FilmStep>(Configs{}, ctas);
}

}  // namespace dgl_ext
