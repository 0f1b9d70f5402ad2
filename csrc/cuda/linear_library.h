// The library executor of concat and sum, for the launchers in linear_*.cu.
#pragma once

#include "launch.h"

namespace dgl_ext {

struct LinearStepArguments;

namespace library {

cudaError_t linear_forward(const LinearHeadForward&, Precision, const LinearForwardPlan&,
                           void* workspace, const Queue&);
cudaError_t linear_backward(const LinearHeadBackward&, Precision, const LinearBackwardPlan&,
                            void* workspace, const Queue&);
/// The workspace is in the arguments.
cudaError_t linear_step(const LinearStepArguments&, Precision, const LinearStepPlan&, const Queue&);

}  // namespace library
}  // namespace dgl_ext
