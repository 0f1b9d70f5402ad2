// Switching between stacks: all that a fiber needs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

#if defined(__x86_64__)

/// Saves the running stack pointer in *save and continues on `to`. Hand-made because swapcontext
/// makes a system call per switch, and a case makes millions of switches.
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*to*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

/// A stack that switch_stack() can continue on: it starts in `entry`, which must never return.
inline void* fresh_stack(char* top, void (*entry)()) {
  void** s = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15));
  *--s = nullptr;  // so that entry() starts with rsp % 16 == 8, as after a call
  *--s = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--s = nullptr;
  return s;
}

#else
#error "the emulator needs switch_stack() for this processor (x86-64 is there)"
#endif

}  // namespace emulator
