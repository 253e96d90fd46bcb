// SPDX-License-Identifier: Apache-2.0
// The tensor core of sm_80 and later multiplies for a warp: d += a b, where a is 16 rows high and b
// is 8 columns wide. The loads here lay its operands out. With g = l / 4 and t = l % 4, lane l has
//   d[0], d[1]  columns 2 t and 2 t + 1 of row g
//   d[2], d[3]  the same columns of row g + 8
//   a[0], a[1]  rows g and g + 8, the 4 bytes of the contraction from byte 4 t on
//   a[2], a[3]  the same rows, 16 bytes further
//   b[0], b[1]  column g, the 4 bytes from byte 4 t on, and 16 bytes further
// so a step is 32 bytes long in the contraction: 16 elements of 16 bits, or 8 of tf32.
#pragma once

#include "element.h"

namespace kdk::cuda {

#if defined(KDK_CUDA_HOST)

// The hardware reads the upper 19 bits of a tf32.
template <Math kMath>
float element_of(uint32_t word, int e) {
  if constexpr (sizeof(Element<kMath>) == 4) {
    return float_of(word & 0xffffe000u);
  } else {
    return to_float(Element<kMath>{static_cast<uint16_t>(word >> 16 * e)});
  }
}

template <Math kMath>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr int kEach = 4 / sizeof(Element<kMath>);  // elements in a register
  struct Fragments {
    float a[4][kEach], b[2][kEach];
  } mine;
  for (int e = 0; e < kEach; ++e) {
    for (int r = 0; r < 4; ++r) mine.a[r][e] = element_of<kMath>(a[r], e);
    for (int r = 0; r < 2; ++r) mine.b[r][e] = element_of<kMath>(b[r], e);
  }
  const Fragments* all = kdk::host::gather("mma.sync", mine);
  const int g = kdk::host::lane() / 4, t = kdk::host::lane() % 4;
  for (int r = 0; r < 4; ++r) {
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 4; ++k) {
        const Fragments &row = all[4 * g + k], &column = all[4 * (2 * t + r % 2) + k];
        for (int e = 0; e < kEach; ++e) d[r] += row.a[2 * half + r / 2][e] * column.b[half][e];
      }
    }
  }
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const void* const* rows = kdk::host::gather("ldmatrix", row);
  const int lane = kdk::host::lane();
  for (int m = 0; m < 4; ++m) r[m] = static_cast<const uint32_t*>(rows[8 * m + lane / 4])[lane % 4];
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const void* const* rows = kdk::host::gather("ldmatrix.trans", row);
  const int lane = kdk::host::lane();
  const auto element = [&](int i) { return static_cast<const uint16_t*>(rows[i])[lane / 4]; };
  for (int m = 0; m < 4; ++m) {
    const int i = 8 * m + lane % 4 * 2;
    r[m] = element(i) | static_cast<uint32_t>(element(i + 1)) << 16;
  }
}

#else

template <Math kMath>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define KDK_MMA(shape_and_types)                                                  \
  asm volatile("mma.sync.aligned." shape_and_types                                \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (kMath == Math::kBFloat16) {
    KDK_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else if constexpr (kMath == Math::kFloat16) {
    KDK_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    KDK_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef KDK_MMA
}

// Loads four matrices, 8 x 8 of 16 bits or 8 x 4 of 32 bits: lane l gives the address of row l % 8
// of matrix l / 8, and gets the 4 bytes at row l / 4 and byte 4 (l % 4) of each matrix.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Loads four matrices of 16 bits likewise, each transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

#endif

}  // namespace kdk::cuda
