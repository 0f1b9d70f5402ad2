// Vectors of the CPU's loops: GCC's portable ones, two sizes of them. A body is compiled for the
// portable baseline, for AVX2 with FMA and, where wider vectors pay, for AVX-512; which one runs is
// decided at run time, so that one wheel serves all processors. Free of torch, like row_passes.h.

#pragma once

#include <cstdint>
#include <cstring>

namespace dgl_ext {

// Vectors are passed by reference: by value, the calling convention depends on what the caller is
// compiled for.
template <typename T, int kBytes = 32>
struct Lanes {
  static constexpr int64_t kCount = kBytes / sizeof(T);
  typedef T Vector __attribute__((vector_size(kBytes)));
};

// What is compiled more than once must end up within the functions that have a target of their own.
#define DGL_EXT_INLINE inline __attribute__((always_inline))

template <typename Vector, typename T>
DGL_EXT_INLINE void load(Vector& vector, const T* data) {
  std::memcpy(&vector, data, sizeof(vector));
}
template <typename Vector, typename T>
DGL_EXT_INLINE void store(T* data, const Vector& vector) {
  std::memcpy(data, &vector, sizeof(vector));
}

enum class Isa { kPortable, kAvx2, kAvx512 };

#if defined(__x86_64__) && defined(__GNUC__)
#define DGL_EXT_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define DGL_EXT_TARGET_AVX512 __attribute__((target("avx512f,avx2,fma")))
// The best one that this processor has.
inline Isa isa() {
  static const Isa best = [] {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kPortable;
    return __builtin_cpu_supports("avx512f") ? Isa::kAvx512 : Isa::kAvx2;
  }();
  return best;
}
#else
#define DGL_EXT_TARGET_AVX2
#define DGL_EXT_TARGET_AVX512
inline Isa isa() { return Isa::kPortable; }
#endif

// A body, which is `DGL_EXT_INLINE`, compiled once more for each target.
template <auto body>
struct Compiled;
template <class Result, class... Arguments, Result (*body)(Arguments...)>
struct Compiled<body> {
  DGL_EXT_TARGET_AVX2 static Result avx2(Arguments... arguments) { return body(arguments...); }
  DGL_EXT_TARGET_AVX512 static Result avx512(Arguments... arguments) { return body(arguments...); }
};

}  // namespace dgl_ext
