// The GPU that plans see when the binding runs over the emulator: small, so that few CTAs, with
// several tiles each, and split sums both occur.
//
// DGL_EXT_EMULATED_LIMIT=n takes multiprocessors away: after the first answer no cooperative launch
// of more than n CTAs fits, and later answers say n; with "n,stubborn" they go on saying 6.
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <string>

#include "cuda/launchers/launch.h"
#include "machine.h"

namespace dgl_ext {

cudaError_t query_device(Device* device) {
  device->multiprocessors = 6;
  if (const char* text = std::getenv("DGL_EXT_EMULATED_LIMIT")) {
    int& limit = emulator::cooperative_limit();
    const bool stubborn = std::string(text).find("stubborn") != std::string::npos;
    if (limit > 0 && !stubborn) device->multiprocessors = limit;
    limit = std::atoi(text);
  }
  device->capability = 90;
  std::fill(std::begin(device->resident_ctas), std::end(device->resident_ctas), 1);
  return cudaSuccess;
}

}  // namespace dgl_ext
