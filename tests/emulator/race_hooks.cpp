// What g++ -fsanitize=thread calls before every load and store of the kernels' translation units.
// The sanitizer's own runtime is not linked: these hooks feed the emulator's race detector.
#include <cstddef>

namespace emulator {
void on_access(const void* address, size_t bytes, bool write, const void* instruction);
void on_aligned_access(const void* address, size_t bytes, bool write, const void* instruction);
}  // namespace emulator

#define EMULATOR_HOOKS(N)                                                  \
  void __tsan_read##N(void* p) {                                           \
    emulator::on_aligned_access(p, N, false, __builtin_return_address(0)); \
  }                                                                        \
  void __tsan_write##N(void* p) {                                          \
    emulator::on_aligned_access(p, N, true, __builtin_return_address(0));  \
  }                                                                        \
  void __tsan_unaligned_read##N(void* p) {                                 \
    emulator::on_access(p, N, false, __builtin_return_address(0));         \
  }                                                                        \
  void __tsan_unaligned_write##N(void* p) {                                \
    emulator::on_access(p, N, true, __builtin_return_address(0));          \
  }

extern "C" {
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)
void __tsan_read_range(void* p, size_t n) {
  emulator::on_access(p, n, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t n) {
  emulator::on_access(p, n, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
