// SPDX-License-Identifier: Apache-2.0
// The tensor core of sm_80 and later: products of a warp, d += a b with a 16 rows high and b 8
// columns wide, and the loads that lay their operands out. Of lane l, with g = l / 4 and t = l % 4,
//   d[0], d[1]  row g, columns 2 t and 2 t + 1;  d[2], d[3]  row g + 8
//   a[0], a[1]  rows g and g + 8, 4 bytes of the contraction from byte 4 t on;  a[2], a[3]  16
//   bytes
//               further
//   b[0], b[1]  column g, likewise
// so a step is 32 bytes long in the contraction: 16 elements of 16 bits, 8 of tf32.
#pragma once

#include "element.h"

namespace kdk::cuda {

#if defined(KDK_CUDA_HOST)

template <Math kMath>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const kdk::host::Fragments fragments{d, a, b};
  const auto what = kMath == Math::kBFloat16  ? kdk::host::mma_bf16
                    : kMath == Math::kFloat16 ? kdk::host::mma_fp16
                                              : kdk::host::mma_tf32;
  kdk::host::sync_warp(what, &fragments, nullptr);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  kdk::host::sync_warp(kdk::host::load_matrices, row, r);
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  kdk::host::sync_warp(kdk::host::load_matrices_transposed, row, r);
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

// Four 8 x 8 matrices of 16 bits, or 8 x 4 of 32: lane l gives the address of row l % 8 of matrix
// l / 8, and gets of each the 4 bytes at row l / 4 and byte 4 (l % 4).
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// The same of matrices of 16 bits, each transposed.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

#endif

}  // namespace kdk::cuda
