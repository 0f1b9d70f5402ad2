#include <algorithm>
#include <climits>
#include <iterator>

#include "cuda/launchers/launch.h"

namespace dgl_ext {

cudaError_t query_device(Device* device) {
  int index = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&index);
  const auto ask = [&](cudaDeviceAttr attribute, int* value) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(value, attribute, index);
  };
  ask(cudaDevAttrMultiProcessorCount, &device->multiprocessors);
  ask(cudaDevAttrComputeCapabilityMajor, &major);
  ask(cudaDevAttrComputeCapabilityMinor, &minor);
  if (status != cudaSuccess) return status;
  device->capability = 10 * major + minor;
  std::fill(std::begin(device->resident_ctas), std::end(device->resident_ctas), 0);
  if (device->capability < 80) return cudaSuccess;  // no kernel to ask about: plans say none

  std::fill(std::begin(device->resident_ctas), std::end(device->resident_ctas), INT_MAX);
  status = linear_head_occupancy(device->resident_ctas);
  if (status == cudaSuccess) status = linear_step_occupancy(device->resident_ctas);
  if (status == cudaSuccess) status = film_head_occupancy(device->resident_ctas);
  if (status == cudaSuccess) status = film_step_occupancy(device->resident_ctas);
  return status;
}

}  // namespace dgl_ext
