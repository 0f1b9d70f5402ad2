// The arithmetic of host_cublas.cpp, in a file that is not instrumented: it touches nothing of the
// emulated machine's memory, and it is most of the work.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

/// a (m, k) times b (k, n), both row after row.
std::vector<double> product(const std::vector<double>& a, const std::vector<double>& b, int64_t m,
                            int64_t n, int64_t k);
/// To nearest, ties away from zero.
float rounded_to_tf32(float value);

}  // namespace emulator
