// The CUDA launchers: plain functions of a problem, its plan, a workspace and a stream.
//
// A plan says who computes the products: this project's tiles or cuBLAS (library/). They return
// without waiting and are safe under CUDA graph capture. `workspace` holds
// plan.launch.workspace_bytes bytes, 16-byte aligned, that nobody else uses until the launch is
// done; null where that is 0. The plan must have been made for this very problem, precision and
// device.
#pragma once

#include "cuda/library/matmul.h"

namespace dgl_ext {

/// Fills what plans need to know of the current device (not max_ctas). Slow: asks the occupancy of
/// every kernel; callers keep the result per device.
cudaError_t query_device(Device* device);

cudaError_t linear_head_forward(const LinearHeadForward& problem, Precision precision,
                                const LinearForwardPlan& plan, void* workspace, const Queue& queue);
cudaError_t linear_head_backward(const LinearHeadBackward& problem, Precision precision,
                                 const LinearBackwardPlan& plan, void* workspace,
                                 const Queue& queue);
cudaError_t linear_head_step(const LinearHeadStep& problem, Precision precision,
                             const LinearStepPlan& plan, void* workspace, const Queue& queue);
cudaError_t film_head_forward(const FilmHeadForward& problem, Precision precision,
                              const FilmForwardPlan& plan, void* workspace, const Queue& queue);
cudaError_t film_head_backward(const FilmHeadBackward& problem, Precision precision,
                               const FilmBackwardPlan& plan, void* workspace, const Queue& queue);
cudaError_t film_head_step(const FilmHeadStep& problem, Precision precision,
                           const FilmStepPlan& plan, void* workspace, const Queue& queue);
/// Nothing is read or written where the scale turns out to be 1 and `to` is `from`.
cudaError_t scale_gradients(const ScaledGradients& problem, const Device& device,
                            cudaStream_t stream);

/// query_device's share of each head: lowers ctas[tile] to what this head's kernels allow.
cudaError_t linear_head_occupancy(int (&ctas)[kTileCount]);
cudaError_t linear_step_occupancy(int (&ctas)[kTileCount]);
cudaError_t film_head_occupancy(int (&ctas)[kTileCount]);
cudaError_t film_step_occupancy(int (&ctas)[kTileCount]);

}  // namespace dgl_ext
