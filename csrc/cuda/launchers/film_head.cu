#include "cuda/kernels/film_backward.cuh"
#include "cuda/kernels/film_forward.cuh"
#include "cuda/kernels/instances.cuh"
#include "cuda/launchers/launch.h"
#include "cuda/library/library.h"

namespace dgl_ext {

cudaError_t film_head_forward(const FilmHeadForward& problem, Precision precision,
                              const FilmForwardPlan& plan, void* workspace, const Queue& queue) {
  if (problem.head.rows == 0) return cudaSuccess;
  if (plan.launch.executor == Executor::kLibrary) {
    return library::film_forward(problem, precision, plan, workspace, queue);
  }
  const FilmForwardArguments arguments{problem, plan, workspace};
  return launch_head<FilmForward>(Configs{}, precision.dtype, plan.launch, arguments, queue.stream);
}

cudaError_t film_head_backward(const FilmHeadBackward& problem, Precision precision,
                               const FilmBackwardPlan& plan, void* workspace, const Queue& queue) {
  FilmBackwardArguments arguments{problem, plan, workspace};
  FilmHeadBackward& p = arguments.problem;
  // what nothing flows into is dropped here, so that the kernel asks one question only
  if (!condition_flows(p)) p.grad_condition.data = nullptr;
  if (!target_flows(p)) p.grad_target.data = nullptr;
  if (!film_weight_flows(p)) p.grad_film_weight.data = nullptr;
  if (!parameters_flow(p)) p.grad_film_bias = p.grad_out_bias = p.grad_out_weight.data = nullptr;
  if (!p.grad_condition.data && !p.grad_target.data && !p.grad_film_weight.data &&
      !p.grad_film_bias && !p.grad_out_weight.data && !p.grad_out_bias) {
    return cudaSuccess;
  }
  if (plan.launch.executor == Executor::kLibrary) {
    return library::film_backward(p, precision, plan, workspace, queue);
  }
  return launch_head<FilmBackward>(Configs{}, precision.dtype, plan.launch, arguments,
                                   queue.stream);
}

cudaError_t film_head_occupancy(int (&ctas)[kTileCount]) {
  const cudaError_t status = lower_occupancy<FilmForward>(Configs{}, ctas);
  if (status != cudaSuccess) return status;
  return lower_occupancy<FilmBackward>(Configs{}, ctas);
}

}  // namespace dgl_ext
