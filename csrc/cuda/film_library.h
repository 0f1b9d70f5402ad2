// The library executor of FiLM, for the launchers in film_*.cu.
#pragma once

#include "launch.h"

namespace dgl_ext {

struct FilmStepArguments;

namespace library {

cudaError_t film_forward(const FilmHeadForward&, Precision, const FilmForwardPlan&, void* workspace,
                         const Queue&);
cudaError_t film_backward(const FilmHeadBackward&, Precision, const FilmBackwardPlan&,
                          void* workspace, const Queue&);
/// The workspace is in the arguments.
cudaError_t film_step(const FilmStepArguments&, Precision, const FilmStepPlan&, const Queue&);

}  // namespace library
}  // namespace dgl_ext
