// ldmatrix and mma.sync on fibers, fragment by fragment as the PTX manual lays them out
// ("Matrix fragments for mma.m16n8k16" and "... m16n8k8"). In all of them lane = 4 * group + item.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "device_language.h"

namespace emulator {

inline void ldmatrix_x4(uint32_t (&registers)[4], const void* row, bool transposed) {
  struct Lane {
    const void* row;
    uint32_t* registers;
    bool transposed;
  } mine{row, registers, transposed};
  static char kind;
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: row address not 16-byte aligned");
  touch(row, 16, false);
  warp_collective(&kind, "ldmatrix.x4", false, &mine, [](void** lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t element[8][8];  // lane 8 * matrix + i holds the address of row i
      for (int i = 0; i < 8; ++i) {
        memcpy(element[i], static_cast<Lane*>(lanes[matrix * 8 + i])->row, 16);
      }
      for (int l = 0; l < 32; ++l) {
        Lane* lane = static_cast<Lane*>(lanes[l]);
        const int group = l / 4, column = 2 * (l % 4);
        const uint16_t low = lane->transposed ? element[column][group] : element[group][column];
        const uint16_t high =
            lane->transposed ? element[column + 1][group] : element[group][column + 1];
        lane->registers[matrix] = low | uint32_t(high) << 16;
      }
    }
  });
}

/// __shfl_sync and its kin: every lane gets the value of the lane that it names.
template <class V>
V shuffle(V value, int from) {
  struct Lane {
    V given, received;
    int from;
  } mine{value, {}, from};
  static char kind;
  warp_collective(&kind, "shfl.sync", false, &mine, [](void** lanes) {
    for (int l = 0; l < 32; ++l) {
      Lane* lane = static_cast<Lane*>(lanes[l]);
      lane->received = static_cast<Lane*>(lanes[lane->from])->given;
    }
  });
  return mine.received;
}
inline void sync_warp() {
  static char kind;
  warp_collective(&kind, "bar.warp.sync", true, nullptr, [](void**) {});
}
/// __popc(__ballot_sync())
inline int count_lanes(bool predicate) {
  struct Lane {
    bool predicate;
    int count;
  } mine{predicate, 0};
  static char kind;
  warp_collective(&kind, "vote.sync", false, &mine, [](void** lanes) {
    int count = 0;
    for (int l = 0; l < 32; ++l) count += static_cast<Lane*>(lanes[l])->predicate;
    for (int l = 0; l < 32; ++l) static_cast<Lane*>(lanes[l])->count = count;
  });
  return mine.count;
}

inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
inline float to_float(__half value) { return __half2float(value); }
template <class T>
float half_of(uint32_t pair, int high) {
  const uint16_t bits = high ? pair >> 16 : pair;
  T value;
  memcpy(&value, &bits, 2);
  return to_float(value);
}
inline float tf32_of(uint32_t bits) {
  bits &= 0xffffe000u;  // the tensor core ignores the low 13 bits
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

/// D += A B for one 16x8 fragment; `unpack` fills A (16 x K) and B (K x 8) from the lanes.
template <int K, class Unpack>
void multiply_fragment(void** lanes, Unpack unpack) {
  float a[16][K], b[K][8], product[16][8] = {};
  for (int l = 0; l < 32; ++l) unpack(*static_cast<MmaLane*>(lanes[l]), l / 4, l % 4, a, b);
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < K; ++k) {
      for (int j = 0; j < 8; ++j) product[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int l = 0; l < 32; ++l) {
    float* d = static_cast<MmaLane*>(lanes[l])->d;
    const int group = l / 4, column = 2 * (l % 4);
    d[0] += product[group][column];
    d[1] += product[group][column + 1];
    d[2] += product[group + 8][column];
    d[3] += product[group + 8][column + 1];
  }
}

/// mma.sync.m16n8k16 for T = __nv_bfloat16 or __half, fp32 accumulators
template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaLane mine{d, a, b};
  static char kind;
  warp_collective(&kind, "mma.m16n8k16", false, &mine, [](void** lanes) {
    multiply_fragment<16>(lanes, [](const MmaLane& lane, int group, int item, auto& am, auto& bm) {
      for (int h = 0; h < 2; ++h) {
        const int k = 2 * item + h;
        am[group][k] = half_of<T>(lane.a[0], h);
        am[group + 8][k] = half_of<T>(lane.a[1], h);
        am[group][k + 8] = half_of<T>(lane.a[2], h);
        am[group + 8][k + 8] = half_of<T>(lane.a[3], h);
        bm[k][group] = half_of<T>(lane.b[0], h);
        bm[k + 8][group] = half_of<T>(lane.b[1], h);
      }
    });
  });
}

/// mma.sync.m16n8k8 with tf32 operands
inline void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaLane mine{d, a, b};
  static char kind;
  warp_collective(&kind, "mma.m16n8k8.tf32", false, &mine, [](void** lanes) {
    multiply_fragment<8>(lanes, [](const MmaLane& lane, int group, int item, auto& am, auto& bm) {
      am[group][item] = tf32_of(lane.a[0]);
      am[group + 8][item] = tf32_of(lane.a[1]);
      am[group][item + 4] = tf32_of(lane.a[2]);
      am[group + 8][item + 4] = tf32_of(lane.a[3]);
      bm[item][group] = tf32_of(lane.b[0]);
      bm[item + 4][group] = tf32_of(lane.b[1]);
    });
  });
}

}  // namespace emulator
