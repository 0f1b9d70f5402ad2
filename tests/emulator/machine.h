// Runs CUDA C++ kernels on the CPU: one fiber per CUDA thread, all CTAs of a grid alive at once.
// This is the scheduler's interface; memory.h has guarded buffers and the race detector.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

#include "cuda_runtime_api.h"

namespace emulator {

/// Which runnable thread goes next. kPriorities gives every warp a random priority that changes
/// now and then: warps run far ahead of each other, which is what uncovers missing barriers.
enum class Policy { kLinear, kReverse, kRandom, kPriorities };

/// When a cp.async lands. Only late or random delivery uncovers a missing wait.
enum class Delivery { kLate, kEarly, kRandom };

struct Options {
  uint64_t seed = 1;
  Policy policy = Policy::kPriorities;
  Delivery delivery = Delivery::kLate;
  bool detect_races = false;  // needs kernels built with -fsanitize=thread
};

/// What the emulated machine found wrong: divergence, race, bad access, deadlock.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Statistics {
  uint64_t switches = 0, barriers = 0, grid_syncs = 0, warp_operations = 0, copies = 0;
  uint64_t accesses = 0, launches = 0;
  uint64_t matmuls = 0, watched_reads = 0;
  uint64_t shared_bytes = 0;  // per CTA, that the last launch asked for
};

/// Options and statistics of the launches that follow; set by the tests.
Options& options();
Statistics& statistics();

/// The largest grid that a cooperative launch may have; 0: any. A GPU's multiprocessors may become
/// fewer while a program runs (MPS, green contexts).
int& cooperative_limit();

/// Runs `kernel` once per thread. Throws Error; `cooperative` allows grid_barrier().
void launch(dim3 grid, dim3 block, size_t shared_bytes, bool cooperative,
            const std::function<void()>& kernel);

// ---- what kernel code reaches through device_language.h and intrinsics.h ------------------------

struct ThreadContext {
  dim3 thread, block, block_size, grid_size;
  unsigned char* shared;
};
extern ThreadContext* context;  // of the CUDA thread that runs now

void block_barrier(const char* file, int line);
void grid_barrier(const char* file, int line);

/// All 32 lanes must arrive with the same `kind`; the last one runs `function` on their arguments.
using WarpFunction = void (*)(void** lane_arguments);
void warp_collective(const void* kind, const char* what, bool orders_memory, void* argument,
                     WarpFunction function);

void copy_async(void* destination, const void* source, int bytes, int source_bytes);
void copy_async_commit();
void copy_async_wait(int pending_groups);

/// Checks an access made by an emulated instruction (plain loads and stores come from the hooks).
void touch(const void* address, size_t bytes, bool write);

[[noreturn]] void fail(const std::string& message);

}  // namespace emulator
