// The library executor, for the launchers.
#pragma once

#include "cuda/library/matmul.h"

namespace dgl_ext {

struct LinearStepArguments;
struct FilmStepArguments;

namespace library {

cudaError_t linear_forward(const LinearHeadForward&, Precision, const LinearForwardPlan&,
                           void* workspace, const Queue&);
cudaError_t linear_backward(const LinearHeadBackward&, Precision, const LinearBackwardPlan&,
                            void* workspace, const Queue&);
cudaError_t film_forward(const FilmHeadForward&, Precision, const FilmForwardPlan&, void* workspace,
                         const Queue&);
cudaError_t film_backward(const FilmHeadBackward&, Precision, const FilmBackwardPlan&,
                          void* workspace, const Queue&);
/// The workspace of a step is in its arguments.
cudaError_t linear_step(const LinearStepArguments&, Precision, const LinearStepPlan&, const Queue&);
cudaError_t film_step(const FilmStepArguments&, Precision, const FilmStepPlan&, const Queue&);

}  // namespace library
}  // namespace dgl_ext
