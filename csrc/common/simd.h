// SPDX-License-Identifier: Apache-2.0
// Run-time choice of an instruction set. CMake compiles each `*_simd.cpp` once per level, with
// KDK_SIMD_LEVEL naming the namespace; those files keep everything else in it and include only what
// inlines, so that no function compiled for a wide level can be linked into a narrow one.
#pragma once

namespace kdk {

enum class SimdLevel { kBaseline, kAvx2, kAvx512 };

// The widest level that was compiled, that this processor has, and that KDKERNELS_SIMD ("baseline",
// "avx2", "avx512") allows.
SimdLevel simd_level();

}  // namespace kdk

extern "C" const char* kdkernels_simd_level();
