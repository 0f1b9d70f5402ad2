// One output tile, acc[rows, columns] = sum_k A(m, k) B(n, k), computed by one CTA.
//
// Each operand is contiguous along k or along m / n, and is staged in shared memory in that same
// orientation by a pipeline of cp.async stages: nothing is ever transposed in memory. 16-bit types
// use mma.sync, float exact FMAs or tf32 fragments, double FMAs.
#pragma once

#include "cuda/kernels/intrinsics.cuh"
#include "cuda/kernels/tile_loader.cuh"
#include "cuda/plan/plan.h"

namespace dgl_ext {

constexpr int kRun = 4;  ///< neighbouring columns that a thread works on at once

/// Along which index an operand's memory is contiguous.
enum class Major { kDepth, kOuter };

template <class T>
struct Operand {
  const T* data;
  int64_t stride;
};

/// An instantiation of the kernels. kAligned: all operands allow 16-byte copies.
template <class T_, Tile kTile_, bool kAligned_>
struct Config {
  using T = T_;
  using Accumulator = accumulator_t<T>;
  static constexpr Tile kTile = kTile_;
  static constexpr bool kAligned = kAligned_;
  static constexpr TileShape kShape = tile_shape(kTile_);
  static constexpr int kRows = kShape.rows, kColumns = kShape.columns, kDepth = kShape.depth;
  static constexpr int kStages = kShape.stages, kThreads = kShape.threads();
  static constexpr int kWarps = kThreads / 32;
};

template <class C, Major kMajorA, Major kMajorB>
class GemmTile {
 public:
  using T = typename C::T;
  using Accumulator = typename C::Accumulator;

 private:
  static constexpr bool kTensorCores = C::kShape.tensor_cores;
  static constexpr bool kTf32 = kTensorCores && sizeof(T) == 4;
  static constexpr int kVector = 16 / sizeof(T);
  static constexpr int kWarpsN = C::kShape.warps_n, kWarpsM = C::kShape.warps_m;

  // Row padding against bank conflicts: one 16-byte unit, but 8 floats where tf32 fragments are
  // gathered down a column.
  static constexpr int padding(Major major) {
    return kTf32 && major == Major::kOuter ? 8 : kVector;
  }
  template <Major kMajor, int kOuter>
  using Loader = TileLoader<T, kMajor == Major::kDepth ? kOuter : C::kDepth,
                            kMajor == Major::kDepth ? C::kDepth : kOuter, padding(kMajor),
                            C::kThreads, C::kAligned>;
  using LoaderA = Loader<kMajorA, C::kRows>;
  using LoaderB = Loader<kMajorB, C::kColumns>;
  static constexpr int kPitchA = LoaderA::kPitch, kPitchB = LoaderB::kPitch;
  static constexpr int kStageElements = LoaderA::kElements + LoaderB::kElements;
  static constexpr int kPipelineBytes = C::kStages * kStageElements * int(sizeof(T));

  // Tensor cores: a warp owns kFragmentsM x kFragmentsN fragments of 16x8.
  static constexpr int kFragmentsM = C::kRows / kWarpsM / 16;
  static constexpr int kFragmentsN = C::kColumns / kWarpsN / 8;
  // SIMT: the lanes of a warp form 4 (m) x 8 (n); each thread owns kThreadM x kThreadN elements,
  // in vectors of kVectorM / kVectorN neighbours where the operand is contiguous along m / n.
  static constexpr int kLanesM = kWarpsM * 4, kLanesN = kWarpsN * 8;
  static constexpr int kThreadM = C::kRows / kLanesM, kThreadN = C::kColumns / kLanesN;
  static constexpr int vector_of(Major major, int count) {
    return major == Major::kDepth ? 1 : count < kVector ? count : kVector;
  }
  static constexpr int kSimtUnroll = C::kDepth / kVector;
  static constexpr int kVectorM = vector_of(kMajorA, kThreadM);
  static constexpr int kVectorN = vector_of(kMajorB, kThreadN);
  static constexpr int kAccumulators =
      kTensorCores ? kFragmentsM * kFragmentsN * 4 : kThreadM * kThreadN;

  // The epilogue passes through shared memory, which the pipeline no longer needs.
  static constexpr int kOutPitch = C::kColumns + 8;
  static_assert(C::kRows * kOutPitch * int(sizeof(Accumulator)) <= kPipelineBytes);

 public:
  static constexpr int kSharedBytes = kPipelineBytes;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) acc_[i] = 0;
  }

  /// Adds the products over [k_begin, k_end) for the tile at (m0, n0) of an m_end x n_end output.
  /// Shared memory must be free, and is free again when it returns.
  __device__ __forceinline__ void accumulate(T* shared, const Operand<T>& a, const Operand<T>& b,
                                             int64_t m0, int64_t m_end, int64_t n0, int64_t n_end,
                                             int64_t k_begin, int64_t k_end) {
    Source source{origin<kMajorA>(a, m0, k_begin),
                  origin<kMajorB>(b, n0, k_begin),
                  a.stride,
                  b.stride,
                  int(smaller(m_end - m0, C::kRows)),
                  int(smaller(n_end - n0, C::kColumns)),
                  k_end - k_begin};
    const int64_t steps = ceil_div(k_end - k_begin, C::kDepth);
#pragma unroll 1
    for (int s = 0; s < C::kStages - 1; ++s) {
      if (s < steps) load_next(shared + s * kStageElements, source);
      copy_async_commit();
    }
    int read = 0, write = C::kStages - 1;
#pragma unroll 1
    for (int64_t step = 0; step < steps; ++step) {
      copy_async_wait<C::kStages - 2>();
      __syncthreads();  // stage `read` has landed, and every thread is done with stage `write`
      if (step + C::kStages - 1 < steps) load_next(shared + write * kStageElements, source);
      copy_async_commit();
      const T* stage = shared + read * kStageElements;
      if constexpr (kTensorCores) {
        multiply_tensor(stage, stage + LoaderA::kElements);
      } else {
        multiply_simt(stage, stage + LoaderA::kElements);
      }
      read = read + 1 == C::kStages ? 0 : read + 1;
      write = write + 1 == C::kStages ? 0 : write + 1;
    }
    __syncthreads();  // every copy has been waited for above: shared memory is free again
  }

  /// Hands the tile to f(m, n, v, count): v[0..count) are the elements (m, n..n+count) in tile
  /// coordinates, all inside the output. Going through shared memory makes the runs contiguous
  /// over a warp and keeps one copy of f in the code.
  template <class F>
  __device__ __forceinline__ void for_each_run(T* shared, int64_t m0, int64_t m_end, int64_t n0,
                                               int64_t n_end, F&& f) {
    auto* out = reinterpret_cast<Accumulator*>(shared);
    const int rows = int(smaller(m_end - m0, C::kRows));
    const int columns = int(smaller(n_end - n0, C::kColumns));
    spill(out);
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * (C::kColumns / kRun); i += C::kThreads) {
      const int m = i / (C::kColumns / kRun), n = i % (C::kColumns / kRun) * kRun;
      if (n >= columns) continue;
      Accumulator v[kRun];
#pragma unroll
      for (int e = 0; e < kRun; ++e) v[e] = out[m * kOutPitch + n + e];
      f(m, n, v, int(smaller(columns - n, kRun)));
    }
    __syncthreads();
  }

 private:
  struct Source {
    const T *a, *b;
    int64_t stride_a, stride_b;
    int rows, columns;   // that exist of this tile
    int64_t depth_left;  // that remains to be loaded
  };

  template <Major kMajor>
  static __device__ __forceinline__ const T* origin(const Operand<T>& x, int64_t outer, int64_t k) {
    return kMajor == Major::kDepth ? x.data + outer * x.stride + k : x.data + k * x.stride + outer;
  }
  template <Major kMajor>
  static __device__ __forceinline__ const T* advance(const T* p, int64_t stride) {
    return kMajor == Major::kDepth ? p + C::kDepth : p + C::kDepth * stride;
  }

  static __device__ __forceinline__ void load_next(T* stage, Source& s) {
    const int depth = int(smaller(s.depth_left, C::kDepth));
    if constexpr (kMajorA == Major::kDepth) {
      LoaderA::load(stage, s.a, s.stride_a, s.rows, depth);
    } else {
      LoaderA::load(stage, s.a, s.stride_a, depth, s.rows);
    }
    T* stage_b = stage + LoaderA::kElements;
    if constexpr (kMajorB == Major::kDepth) {
      LoaderB::load(stage_b, s.b, s.stride_b, s.columns, depth);
    } else {
      LoaderB::load(stage_b, s.b, s.stride_b, depth, s.columns);
    }
    s.a = advance<kMajorA>(s.a, s.stride_a);
    s.b = advance<kMajorB>(s.b, s.stride_b);
    s.depth_left -= C::kDepth;
  }

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp_m() { return threadIdx.x / 32 / kWarpsN; }
  static __device__ __forceinline__ int warp_n() { return threadIdx.x / 32 % kWarpsN; }

  // ---- tensor cores

  static constexpr int kRowElements = 16 / sizeof(T);      // one row of an ldmatrix matrix
  static constexpr int kFragmentDepth = 2 * kRowElements;  // k of one fragment

  static __device__ __forceinline__ void load_fragment_a(uint32_t (&r)[4], const T* shared, int m,
                                                         int k) {
    const int l = lane();
    if constexpr (kMajorA == Major::kDepth) {
      load_matrices<false>(r, shared + (m + l % 16) * kPitchA + k + l / 16 * kRowElements);
    } else if constexpr (!kTf32) {
      load_matrices<true>(r, shared + (k + l % 8 + l / 16 * 8) * kPitchA + m + l / 8 % 2 * 8);
    } else {  // ldmatrix transposes 16-bit elements only
      const auto* bits = reinterpret_cast<const uint32_t*>(shared);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        r[q] = bits[(k + l % 4 + q / 2 * 4) * kPitchA + m + l / 4 + q % 2 * 8];
      }
    }
  }

  /// Two neighbouring fragments of B: r[0], r[1] and r[2], r[3].
  static __device__ __forceinline__ void load_fragments_b(uint32_t (&r)[4], const T* shared, int n,
                                                          int k) {
    const int l = lane();
    if constexpr (kMajorB == Major::kDepth) {
      load_matrices<false>(
          r, shared + (n + l % 8 + l / 16 * 8) * kPitchB + k + l / 8 % 2 * kRowElements);
    } else if constexpr (!kTf32) {
      load_matrices<true>(r, shared + (k + l % 16) * kPitchB + n + l / 16 * 8);
    } else {
      const auto* bits = reinterpret_cast<const uint32_t*>(shared);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        r[q] = bits[(k + l % 4 + q % 2 * 4) * kPitchB + n + l / 4 + q / 2 * 8];
      }
    }
  }

  __device__ __forceinline__ void multiply_tensor(const T* shared_a, const T* shared_b) {
    const int m0 = warp_m() * kFragmentsM * 16, n0 = warp_n() * kFragmentsN * 8;
#pragma unroll
    for (int k = 0; k < C::kDepth; k += kFragmentDepth) {
      uint32_t a[kFragmentsM][4], b[kFragmentsN / 2][4];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) load_fragment_a(a[i], shared_a, m0 + i * 16, k);
#pragma unroll
      for (int j = 0; j < kFragmentsN / 2; ++j) load_fragments_b(b[j], shared_b, n0 + j * 16, k);
      if constexpr (kTf32) {
#pragma unroll
        for (int i = 0; i < kFragmentsM * 4; ++i) a[i / 4][i % 4] = round_to_tf32(a[i / 4][i % 4]);
#pragma unroll
        for (int j = 0; j < kFragmentsN * 2; ++j) b[j / 4][j % 4] = round_to_tf32(b[j / 4][j % 4]);
      }
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
          auto& d = reinterpret_cast<float (&)[4]>(acc_[(i * kFragmentsN + j) * 4]);
          const uint32_t pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply_fragments<T>(d, a[i], pair);
        }
      }
    }
  }

  // ---- SIMT

  static __device__ __forceinline__ int simt_row(int i) {
    const int ty = warp_m() * 4 + lane() / 8;
    return i / kVectorM * (kLanesM * kVectorM) + ty * kVectorM + i % kVectorM;
  }
  static __device__ __forceinline__ int simt_column(int j) {
    const int tx = warp_n() * 8 + lane() % 8;
    return j / kVectorN * (kLanesN * kVectorN) + tx * kVectorN + j % kVectorN;
  }

  __device__ __forceinline__ void multiply_simt(const T* shared_a, const T* shared_b) {
#pragma unroll kSimtUnroll
    for (int k = 0; k < C::kDepth; k += kVector) {
      T a[kThreadM][kVector];
      if constexpr (kMajorA == Major::kDepth) {
#pragma unroll
        for (int i = 0; i < kThreadM; ++i) {
          const auto v = load_vector<kVector>(shared_a + simt_row(i) * kPitchA + k);
#pragma unroll
          for (int q = 0; q < kVector; ++q) a[i][q] = v.v[q];
        }
      } else {
#pragma unroll
        for (int q = 0; q < kVector; ++q) {
#pragma unroll
          for (int i = 0; i < kThreadM; i += kVectorM) {
            const auto v = load_vector<kVectorM>(shared_a + (k + q) * kPitchA + simt_row(i));
#pragma unroll
            for (int e = 0; e < kVectorM; ++e) a[i + e][q] = v.v[e];
          }
        }
      }
      if constexpr (kMajorB == Major::kDepth) {
#pragma unroll
        for (int j = 0; j < kThreadN; ++j) {
          const auto v = load_vector<kVector>(shared_b + simt_column(j) * kPitchB + k);
#pragma unroll
          for (int q = 0; q < kVector; ++q) {
#pragma unroll
            for (int i = 0; i < kThreadM; ++i) acc_[i * kThreadN + j] += a[i][q] * v.v[q];
          }
        }
      } else {
#pragma unroll
        for (int q = 0; q < kVector; ++q) {
#pragma unroll
          for (int j = 0; j < kThreadN; j += kVectorN) {
            const auto v = load_vector<kVectorN>(shared_b + (k + q) * kPitchB + simt_column(j));
#pragma unroll
            for (int e = 0; e < kVectorN; ++e) {
#pragma unroll
              for (int i = 0; i < kThreadM; ++i) acc_[i * kThreadN + j + e] += a[i][q] * v.v[e];
            }
          }
        }
      }
    }
  }

  template <int kCount>
  static __device__ __forceinline__ Vector<T, kCount> load_vector(const T* p) {
    return *reinterpret_cast<const Vector<T, kCount>*>(p);
  }

  // ---- epilogue

  __device__ __forceinline__ void spill(Accumulator* out) {
    const auto put = [&](int m, int n, Accumulator v) { out[m * kOutPitch + n] = v; };
    if constexpr (kTensorCores) {
      const int m0 = warp_m() * kFragmentsM * 16 + lane() / 4;
      const int n0 = warp_n() * kFragmentsN * 8 + lane() % 4 * 2;
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) {
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            put(m0 + i * 16 + q / 2 * 8, n0 + j * 8 + q % 2, acc_[(i * kFragmentsN + j) * 4 + q]);
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadN; ++j) put(simt_row(i), simt_column(j), acc_[i * kThreadN + j]);
      }
    }
  }

  Accumulator acc_[kAccumulators];
};

/// Writes a run of neighbours, at once where the address allows it. Not inlined into the unrolled
/// code of an epilogue: for_each_run keeps a single copy.
template <class O, class Accumulator, int kCount>
__device__ __forceinline__ void write_run(O* to, const Accumulator (&v)[kCount], int count) {
  // 32 bytes of double go as two accesses by themselves: 16 is the widest there is
  constexpr int kBytes = int(sizeof(O)) * kCount;
  if constexpr (kBytes <= 16) {
    if (count == kCount && reinterpret_cast<uintptr_t>(to) % kBytes == 0) {
      Vector<O, kCount> out;
#pragma unroll
      for (int e = 0; e < kCount; ++e) out.v[e] = narrow<O>(v[e]);
      *reinterpret_cast<Vector<O, kCount>*>(to) = out;
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    if (e < count) to[e] = narrow<O>(v[e]);
  }
}

}  // namespace dgl_ext
