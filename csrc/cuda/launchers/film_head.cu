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
  if (plan.launch.executor == Executor::kLibrary) {
    return library::film_backward(problem, precision, plan, workspace, queue);
  }
  const FilmBackwardArguments arguments{problem, plan, workspace};
  return launch_head<FilmBackward>(Configs{}, precision.dtype, plan.launch, arguments,
                                   queue.stream);
}

cudaError_t film_head_occupancy(int (&ctas)[kTileCount]) {
  const cudaError_t status = lower_occupancy<FilmForward>(Configs{}, ctas);
  if (status != cudaSuccess) return status;
  return lower_occupancy<FilmBackward>(Configs{}, ctas);
}

}  // namespace dgl_ext
